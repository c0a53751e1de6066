"""``TrainableTokensWrapper``: stands in a model for an embedding, or a tied head, some of whose rows are trained."""

from .auxiliary import AuxiliaryTrainingWrapper
from .choice import freeze
from .tokens import TrainableTokensLayer


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """Stands for the embedding in its model, with the ``weight`` that is in use; ``token_adapter`` does the work."""

    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)
    other_param_names = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    def __init__(self, module, tied_adapter=None):
        super().__init__()
        self.token_adapter = TrainableTokensLayer(module, tied_adapter)
        self.train(module.training)

    def adapter_names(self):
        """All adapters with rows here."""
        return self.token_adapter.adapter_names()

    def saved_adapters(self):
        """Those whose rows are saved from here: tied rows are those of the embedding."""
        return self.adapter_names() if self.token_adapter.tied_adapter is None else []

    @property
    def original_module(self):
        return self.token_adapter.base_layer

    @property
    def active_adapters(self):
        return self.token_adapter.active_adapters

    @property
    def merged_adapters(self):
        return self.token_adapter.merged_adapters

    @property
    def merged(self):
        return self.token_adapter.merged

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if "token_adapter" in self.__dict__.get("_modules", {}):
            if name == "_rows":
                self.token_adapter._rows = value
            elif name == "_active_adapter":
                self.token_adapter._active_adapter = [n for n in value if n in self.adapter_names()]

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "token_adapter" not in self.__dict__.get("_modules", {}):
                raise
            adapter = self._modules["token_adapter"]
            return adapter.current_weight() if name == "weight" else getattr(adapter.base_layer, name)

    def forward(self, *args, **kwargs):
        return self.token_adapter(*args, **kwargs)

    def unwrap(self):
        """What stays when the wrapper goes: the module, with what is merged in it."""
        return self.token_adapter.base_layer

    def add(self, adapter_name, token_indices, autocast_adapter_dtype=True, device=None):
        """Gives an adapter its rows; see :meth:`TrainableTokensLayer.update_layer`."""
        self.token_adapter.update_layer(adapter_name, token_indices, autocast_adapter_dtype, device)

    def set_adapter(self, adapter_names, inference_mode=False):
        """Makes the rows of the adapter current and trainable; those of the weight when it has none.

        Several may be, of a layer on its own, where they have no token in common; ValueError where they have.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.token_adapter.check_disjoint([n for n in names if n in self.adapter_names()], self.merged_adapters)
        self.token_adapter.set_adapter(adapter_names, inference_mode)

    def set_requires_grad(self, adapter_names, requires_grad=True):
        """Freezes or unfreezes the rows of the adapters named."""
        self.token_adapter.set_requires_grad(adapter_names, requires_grad)

    def _freeze(self, frozen):
        freeze(self.token_adapter.trainable_tokens_delta.parameters(), frozen)

    def enable_adapters(self, enabled):
        """Turns the rows of the adapters off or on again."""
        self._disable_adapters = not enabled
        self.token_adapter.enable_adapters(enabled)

    def delete_adapter(self, adapter_name):
        """Removes an adapter, if it is here. ValueError when it is merged."""
        self.token_adapter.delete_adapter(adapter_name)
