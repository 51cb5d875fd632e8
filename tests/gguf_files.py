"""Writes small GGUF files for tests."""

import gguf


def write_gguf(file, fields, tensors=None, arch="llama"):
    """Writes a file; a tensor is an array, or (bytes [rows, row bytes] uint8, type)."""
    writer = gguf.GGUFWriter(file, arch)
    for key, value in fields.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }[type(value)]
        add(key, value)
    for name, tensor in (tensors or {}).items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
