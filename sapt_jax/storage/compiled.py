"""Compiled programs on disk, so that no run compiles what another one has compiled (JAX's persistent cache)."""

import os
import platform
import zlib
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

AUTO = "auto"


def keep_programs(where: str) -> None:
    """Tells JAX where compiled programs are kept from now on.

    Args:
      where: a folder; "" keeps none; "auto" is what JAX was told already (JAX_COMPILATION_CACHE_DIR), else a folder for
        this kind of machine in $XDG_CACHE_HOME/sapt_jax or ~/.cache/sapt_jax.
    """
    before = jax.config.jax_compilation_cache_dir
    if where == AUTO:
        where = before or str(_cache_home() / "sapt_jax" / _machine())
    if where == (before or ""):
        return
    jax.config.update("jax_compilation_cache_dir", where or None)
    # Small programs are many: together they take longer than the large ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # JAX decides at its first program whether there is a cache.
    compilation_cache.reset_cache()


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _machine() -> str:
    """The kind of CPU: programs for it may not run on another one that shares the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"
