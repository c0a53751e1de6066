"""Language models with an embedding, a head and, where asked for, one weight for both: what tying is tested on."""

import torch
from torch import nn

VOCABULARY = 13


class Config:
    """As transformers' config: PEFT asks it whether weights are tied."""

    def __init__(self, tied):
        self.tie_word_embeddings, self.vocab_size, self.model_type = tied, VOCABULARY, "tiny"

    def to_dict(self):
        return dict(vars(self))


class Stack(nn.Module):
    def __init__(self, dim, **options):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, dim, **options)
        self.q_proj = nn.Linear(dim, dim)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        return x + torch.tanh(self.q_proj(x))


class Decoder(nn.Module):
    """Token ids (batch, length) -> logits (batch, length, VOCABULARY)."""

    def __init__(self, tied, dim=8, bias=False, **options):
        super().__init__()
        self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self.config, self.model = Config(tied), Stack(dim, **options)
        self.lm_head = nn.Linear(dim, VOCABULARY, bias=bias)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self):
        pass

    def forward(self, ids):
        return self.lm_head(self.model(ids))


class EncoderDecoder(nn.Module):
    """One weight for the embeddings of encoder and decoder, the one that they share, and the head."""

    def __init__(self, tied=True, dim=8):
        super().__init__()
        names = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
        self._tied_weights_keys = {f"{name}.weight": "shared.weight" for name in names}
        self.config, self.shared = Config(tied), nn.Embedding(VOCABULARY, dim)
        self.encoder, self.decoder = Stack(dim), Stack(dim)
        self.lm_head = nn.Linear(dim, VOCABULARY, bias=False)
        if tied:
            for module in (self.encoder.embed_tokens, self.decoder.embed_tokens, self.lm_head):
                module.weight = self.shared.weight

    def get_input_embeddings(self):
        return self.shared

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self):
        pass

    def forward(self, ids):
        return self.lm_head(self.encoder(ids).mean(1, keepdim=True) + self.decoder(ids))


def ids():
    """Every token, and some twice."""
    return torch.cat([torch.arange(VOCABULARY), torch.tensor([1, 3, 0])]).view(4, 4)
