"""Reading of data sets, and conversion of their rows into token ids and labels.

Rows of a causal language model (the formats of TRL and of the OpenAI fine-tuning API):
    {"prompt", "completion"}     the loss is on the completion; both may also be lists of messages
    {"messages": [...]}          a chat, with "tools" and "chat_template_kwargs" if the template takes them; the loss is
                                 on the assistant turns that `trainer.data.chat` names
    {"text"}                     the loss is on every token
Rows of preferences: {"prompt", "chosen", "rejected"}, texts or lists of messages.
Rows of a classifier: {"text", "label"}, with {"text_pair"} for the second of two texts.

    files      rows of a file or a hub data set
    chat       a conversation -> the prompt that a server renders, and the text of the answer after it
    tokens     prompt and completion -> token ids, with the prompt's ids as a server makes them
    examples   rows -> examples, and how many rows were left out or cut
    preferences  rows with a chosen and a rejected answer -> examples
    labels     the names of a classifier's labels
    batches    examples -> padded tensors
"""

from trainer.data.batches import IGNORED, Batch, Example, batches
from trainer.data.examples import Examples, classification_examples, language_examples
from trainer.data.files import Row, digest, read_rows
from trainer.data.labels import label_names
from trainer.data.preferences import as_trl, preference_examples, rejected_example

__all__ = [
    "IGNORED",
    "Batch",
    "Example",
    "Examples",
    "Row",
    "as_trl",
    "batches",
    "classification_examples",
    "digest",
    "label_names",
    "language_examples",
    "preference_examples",
    "read_rows",
    "rejected_example",
]
