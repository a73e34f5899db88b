"""Adapter folders on disk: read, check and write them, and find the base model that they belong to.

`trainer`, `converter` and `astra_serve` exchange data only through these folders.

An Astra adapter folder                              A LoRA folder (PEFT's layout)
    astra_weights.safetensors  M.A M.B M.A0 M.B0         adapter_model.safetensors
    adapter_config.json        PEFT's LoraConfig         adapter_config.json
    astra.json                 provenance                astra.json    provenance, errors measured, probe (optional)
    README.md                  model card                README.md     model card

`M` is a module's name in the base model. Per module, A and A0 are (r, d_in), B and B0 are (d_out, r), all float32; r
may differ between modules. A classifier's head has no factors: its trained parameters are stored under their own names.

Opening a folder checks the headers of its files. The numbers of a layer are read and checked when it is accessed.
"""

from converter.adapter_dir.astra import (
    ASTRA_FORMAT,
    ASTRA_WEIGHTS,
    AstraAdapter,
    AstraLayer,
    astra_digest,
    astra_shapes,
    load_astra,
    save_astra,
)
from converter.adapter_dir.base import base_digest, base_dtype, base_shapes, base_tensors, base_weights, find_base
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
    LORA_WEIGHTS,
    LoraAdapter,
    LoraHeader,
    check_base,
    check_shapes,
    load_lora,
    lora_digest,
    lora_shapes,
    read_lora_header,
    save_lora,
    save_lora_provenance,
)
from converter.adapter_dir.tensors import write_tensors
from converter.adapter_dir.weights import check_weights

__all__ = [
    "ASTRA_FORMAT",
    "ASTRA_WEIGHTS",
    "CONFIG",
    "ENGINE_RANKS",
    "LORA_FORMAT",
    "LORA_WEIGHTS",
    "MAX_JSON_BYTES",
    "PROVENANCE",
    "AdapterError",
    "AstraAdapter",
    "AstraLayer",
    "BaseNotFound",
    "CannotWrite",
    "Json",
    "Layers",
    "LoraAdapter",
    "LoraHeader",
    "MalformedAdapter",
    "NotAnAdapter",
    "OutputExists",
    "Shape",
    "UnsafeAdapter",
    "WrongBase",
    "astra_digest",
    "astra_shapes",
    "base_digest",
    "base_dtype",
    "base_shapes",
    "base_tensors",
    "base_weights",
    "check_base",
    "check_shapes",
    "check_weights",
    "digest",
    "file_in",
    "find_base",
    "load_astra",
    "load_lora",
    "lora_digest",
    "lora_shapes",
    "new_folder",
    "read_json",
    "read_lora_header",
    "refuse_existing",
    "save_astra",
    "save_lora",
    "save_lora_provenance",
    "write_json",
    "write_tensors",
]
