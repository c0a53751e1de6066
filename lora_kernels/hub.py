"""What a saved adapter needs on the Hub: the model card, and the upload.

The card is the ``README.md`` that PEFT writes: its head (YAML) is what the Hub searches by; the text below the head
is left as it is.
"""

import os
import re
import tempfile


class HubModel:
    """The part of ``PeftModel`` that the Hub sees."""

    def push_to_hub(self, repo_id, *, commit_message=None, private=None, token=None, revision=None, **kwargs):
        """Saves the adapters (``kwargs``: as for ``save_pretrained``) and uploads them; needs ``huggingface_hub``.

        Returns:
            What ``huggingface_hub.upload_folder`` returns.
        """
        from huggingface_hub import create_repo, upload_folder

        kwargs.pop("create_pr", None)
        repo = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            message = commit_message or "Upload model"
            return upload_folder(
                repo_id=repo, folder_path=folder, commit_message=message, token=token, revision=revision
            )

    def create_or_update_model_card(self, output_dir):
        """Writes ``README.md`` into ``output_dir``; what a user wrote there stays."""
        path = os.path.join(output_dir, "README.md")
        text = _DEFAULT_TEXT
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                text = file.read()
        head, body = _split(text)
        os.makedirs(output_dir, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"---\n{_updated(head, self._card_fields())}---\n{body}")

    def _card_fields(self):
        model, config = self.get_base_model(), self.base_model.get_model_config(self.get_base_model())
        tags = {*(getattr(model, "model_tags", None) or []), "lora"}
        if hasattr(model, "config") and hasattr(model, "save_pretrained"):
            tags.add("transformers")
        if getattr(model, "name_or_path", None) is not None:
            tags.add(f"base_model:adapter:{model.name_or_path}")
        fields = {"library_name": "peft", "tags": sorted(tags)}
        if "_name_or_path" in config:
            fields["base_model"] = config["_name_or_path"]
        if str(getattr(self, "task_type", "")).endswith("CAUSAL_LM"):
            fields["pipeline_tag"] = "text-generation"
        return fields


_DEFAULT_TEXT = """
# Model card

A LoRA adapter: low-rank updates to the weights of a base model, which is not part of this repository.

## Use

```python
from peft import PeftModel  # or: from lora_kernels import PeftModel

model = PeftModel.from_pretrained(base_model, "name of this repository, or its folder")
```

`base_model` is the model that `base_model_name_or_path` in `adapter_config.json` names, loaded as usual. Call
`merge_and_unload()` to put the updates into its weights and to get a plain model.

## What it was trained for

- Task and intended use: [more information needed]
- Languages: [more information needed]
- Uses that are out of scope: [more information needed]

## Training

- Data, and how it was prepared: [more information needed]
- Hyperparameters (learning rate, batch size, epochs, precision): [more information needed]
- Rank, scaling and target modules: see `adapter_config.json`
- Hardware and duration: [more information needed]

## Evaluation

- Data and metrics: [more information needed]
- Results, beside those of the base model: [more information needed]

## Limits

Biases and risks of the base model hold for the adapter too. Known ones of its own: [more information needed]

## Who made it

- Authors and contact: [more information needed]
- License: [more information needed]
- Citation: [more information needed]
"""


def _split(text):
    """The lines of the YAML head by the field they belong to, and the text below it."""
    found = re.match(r"---\r?\n(.*?)^---\r?\n", text, re.DOTALL | re.MULTILINE)
    head, name = {}, ""
    for line in found.group(1).splitlines() if found else ():
        start = re.match(r"([\w-]+):", line)
        name = start.group(1) if start else name
        head.setdefault(name, []).append(line)
    return head, text[found.end() :] if found else text


def _updated(head, fields):
    for name, value in fields.items():
        if name == "pipeline_tag" and name in head:
            continue
        several = isinstance(value, list)
        head[name] = [f"{name}:", *(f"- {_quoted(v)}" for v in value)] if several else [f"{name}: {_quoted(value)}"]
    return "".join(f"{line}\n" for name in sorted(head) for line in head[name])


def _quoted(value):
    """A scalar of YAML: as it is, as PEFT's cards have it, or in quotes where it could be read as something else."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*(:[\w./-]+)*", str(value))
    if plain and value.lower() not in ("true", "false", "yes", "no", "on", "off", "y", "n", "null"):
        return value
    return "'" + str(value).replace("'", "''") + "'"
