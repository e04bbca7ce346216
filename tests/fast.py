"""Which files `pytest -m fast` runs: of each folder those that answer within seconds, for use after every edit.

Tests in them that are marked slow or nightly are left out. tests/package/test_tiers.py watches that no folder is forgotten.
"""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
FILES = {
    "api": ["test_surface.py", "test_conversion.py", "values/test_sizes.py"],
    "benchmarks": ["test_benchmark_parts.py"],
    "checkpoint": [
        "published/test_zeros_and_strangers.py",
        "families/test_parts_of_a_family.py",
        "test_compare_values.py",
        "test_config.py",
        "test_headers.py",
        "test_inventory.py",
    ],
    "cli": ["terminal/test_advice.py"],
    "converted": ["test_grouping.py", "test_matching.py", "test_config_unlike.py"],
    "demo": ["test_demo_checkpoint.py"],
    "derive": ["values/test_records_of_changes.py"],
    "evaluate": ["values/test_measures.py"],
    "execution": ["test_transforms.py", "run/test_pool.py"],
    "fit": ["test_memory.py", "test_optimiser.py"],
    "formats": [
        "test_packing.py",
        "test_searches.py",
        "test_small_float_groups.py",
        "test_small_floats.py",
    ],
    "generation": ["test_side_files.py"],
    "hosts": ["test_dspark_hosts.py"],
    "hostile": ["test_fuzz.py"],
    "hub": ["values/test_kinds.py", "values/test_names_of_files.py"],
    "inference": [
        "test_decode_control_flow.py",
        "chat/test_chat_vectors.py",
        "parts/test_arguments.py",
        "parts/test_drafting.py",
        "parts/test_layer_state.py",
        "parts/test_ngrams.py",
    ],
    "local_hub": ["test_switches.py"],
    "package": ["test_architecture.py", "test_docs.py", "test_tiers.py"],
    "planning": [
        "test_build.py",
        "recipes/test_rules.py",
        "test_encodings.py",
        "test_layouts.py",
        "test_shards.py",
    ],
    "publishing": ["test_published_card.py"],
    "report": ["test_hostile_names.py"],
    "serving": ["test_fields.py", "test_replies.py"],
    "storage": ["test_wrappers.py", "test_strict_json.py", "test_local_files.py", "untrusted/test_fields.py"],
    "tools": ["test_structure.py", "test_docs_site.py"],
    "verification": ["test_verify_strays.py", "values/test_verdict.py"],
    "words": ["test_figures.py", "test_macs.py", "test_said_elsewhere.py", "test_terminal.py"],
}
"""By folder of tests/."""


def is_fast(path: Path) -> bool:
    """Return whether a file of tests is one of those."""
    folder, _, rest = path.relative_to(TESTS).as_posix().partition("/")
    return rest in FILES.get(folder, [])
