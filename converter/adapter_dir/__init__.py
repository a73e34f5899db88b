"""Adapter folders on disk: read, check and write them, and find the base model that they belong to.

`trainer`, `converter` and `astra_serve` exchange data only through these folders.

An Astra adapter folder                              A LoRA folder (PEFT's layout)
    astra_weights.safetensors  M.A M.B M.A0 M.B0         adapter_model.safetensors
    adapter_config.json        PEFT's LoraConfig         adapter_config.json
    astra.json                 provenance                astra.json    provenance, errors measured, probe (optional)
    README.md                  model card                README.md     model card

Both may have files of a tokenizer and of generation beside them (`chat`): the chat template and defaults of sampling.

`M` is a module's name in the base model. Per module, A and A0 are (r, d_in), B and B0 are (d_out, r), all float32; r
may differ between modules. A classifier's head has no factors: its trained parameters are stored under their own names.

Opening a folder checks the headers of its files. The numbers of a layer are read and checked when it is accessed.

LoRA folders of other tools are read as PEFT reads them:

    opened      finds the files, one or shards, and the kind of the adapter
    names       tensors -> modules, whatever stands before and after their names
    patterns    regular expressions of the config -> modules, in linear time
    lora_config ranks and alphas as numbers, and the reasons to refuse an adapter
    on_base     modules -> those of the base that is there, for PEFT or for an engine; copies of its tensors are dropped
    chat        chat template, defaults of sampling and added tokens
"""

from converter.adapter_dir.astra import (
    ASTRA_FORMAT,
    AstraAdapter,
    AstraLayer,
    astra_digest,
    astra_shapes,
    load_astra,
    save_astra,
)
from converter.adapter_dir.base import (
    BaseModules,
    base_digest,
    base_dtype,
    base_modules,
    base_parameters,
    base_shapes,
    base_tensors,
    base_weights,
    find_base,
    vocabulary_size,
)
from converter.adapter_dir.chat import (
    CHAT_FILES,
    CHAT_TEMPLATE,
    DEFAULT,
    GENERATION,
    GENERATION_CONFIG,
    WITH_TOOLS,
    ChatTemplate,
    copy_chat_files,
    read_added_tokens,
    read_chat_template,
    read_generation_config,
)
from converter.adapter_dir.errors import (
    AdapterError,
    BaseNotFound,
    CannotWrite,
    MalformedAdapter,
    NotAnAdapter,
    OutputExists,
    UnsafeAdapter,
    WrongBase,
)
from converter.adapter_dir.folder import (
    CONFIG,
    MAX_JSON_BYTES,
    PROVENANCE,
    Json,
    digest,
    file_in,
    new_folder,
    read_json,
    refuse_existing,
    write_json,
)
from converter.adapter_dir.layers import Layers, Shape
from converter.adapter_dir.lora import (
    ENGINE_RANKS,
    LORA_FORMAT,
    LoraAdapter,
    LoraHeader,
    check_base,
    check_shapes,
    full_tensors,
    is_plainly_written,
    load_lora,
    lora_digest,
    lora_from,
    lora_shapes,
    opened_shapes,
    read_lora_header,
    save_lora,
    save_lora_config,
    save_lora_provenance,
    write_plainly,
)
from converter.adapter_dir.lora_config import (
    DORA,
    LOHA,
    LOKR,
    LORA,
    MAGNITUDE,
    SUBTRACT_FROM_BASE,
    check_init,
    resolved,
)
from converter.adapter_dir.names import names_in_base
from converter.adapter_dir.on_base import FittedLora, check_only_factors, on_base
from converter.adapter_dir.opened import (
    ASTRA_WEIGHTS,
    LORA_WEIGHTS,
    MAX_SHARDS,
    PICKLED_WEIGHTS,
    SHARD,
    WEIGHTS_INDEX,
    OpenedAdapter,
    check_readable,
    check_there,
    open_adapter,
    shards_of,
    weight_files,
)
from converter.adapter_dir.patterns import pattern_value
from converter.adapter_dir.tensors import write_tensors
from converter.adapter_dir.weights import check_weights

__all__ = [
    "ASTRA_FORMAT",
    "ASTRA_WEIGHTS",
    "CHAT_FILES",
    "CHAT_TEMPLATE",
    "CONFIG",
    "DEFAULT",
    "DORA",
    "ENGINE_RANKS",
    "GENERATION",
    "GENERATION_CONFIG",
    "LOHA",
    "LOKR",
    "LORA",
    "LORA_FORMAT",
    "LORA_WEIGHTS",
    "MAGNITUDE",
    "MAX_JSON_BYTES",
    "MAX_SHARDS",
    "PICKLED_WEIGHTS",
    "PROVENANCE",
    "SHARD",
    "SUBTRACT_FROM_BASE",
    "WEIGHTS_INDEX",
    "WITH_TOOLS",
    "AdapterError",
    "AstraAdapter",
    "AstraLayer",
    "BaseModules",
    "BaseNotFound",
    "CannotWrite",
    "ChatTemplate",
    "FittedLora",
    "Json",
    "Layers",
    "LoraAdapter",
    "LoraHeader",
    "MalformedAdapter",
    "NotAnAdapter",
    "OpenedAdapter",
    "OutputExists",
    "Shape",
    "UnsafeAdapter",
    "WrongBase",
    "astra_digest",
    "astra_shapes",
    "base_digest",
    "base_dtype",
    "base_modules",
    "base_parameters",
    "base_shapes",
    "base_tensors",
    "base_weights",
    "check_base",
    "check_init",
    "check_only_factors",
    "check_readable",
    "check_shapes",
    "check_there",
    "check_weights",
    "copy_chat_files",
    "digest",
    "file_in",
    "find_base",
    "full_tensors",
    "is_plainly_written",
    "load_astra",
    "load_lora",
    "lora_digest",
    "lora_from",
    "lora_shapes",
    "names_in_base",
    "new_folder",
    "on_base",
    "open_adapter",
    "opened_shapes",
    "pattern_value",
    "read_added_tokens",
    "read_chat_template",
    "read_generation_config",
    "read_json",
    "read_lora_header",
    "refuse_existing",
    "resolved",
    "save_astra",
    "save_lora",
    "save_lora_config",
    "save_lora_provenance",
    "shards_of",
    "vocabulary_size",
    "weight_files",
    "write_json",
    "write_plainly",
    "write_tensors",
]
