"""Cases that show what others of the same test show already: they run with --nightly, the others on every change.

One regular expression per line, searched in a test's id. What a test is about has at least one case that always runs.
"""

from __future__ import annotations

import re

NIGHTLY = re.compile(
    "|".join(
        [
            r"test_golden_parity.*chunked.*\[tiny-(a|b)-(0-(2|3|64|129)|1-(2|3|5|64|129)|2-(3|129))\]",
            r"test_golden_parity.*token_by_token.*tiny-b",
            r"test_mtp_decoding.*equal_plain_decoding\[tiny-b-(2|3)-64\]",
            r"test_mtp_decoding.*always_(wrong|right)\[tiny-b-1-64\]",
            r"test_mtp_decoding.*verified_rows.*\[tiny-(a|b)-(0|1)-",
            r"test_layerwise_parity.*requantized.*\[(mxfp8-8|nvfp4-4)\]",
            r"test_layerwise_parity.*each_layout.*\[(mtplx|mlx-lm)\]",
            r"test_rollback.*random_take_backs.*\[tiny-(a|b)-(1|2|4)\]",
            r"test_probabilistic_mode.*every_transition.*-1\]",
            r"test_lossy_hosts.*\[(.*-)?(q8|q6|q3|q2|mxfp8|nvfp4|native)\]",
            r"test_probabilistic_mode.*wrong_acceptance.*\[accept all\]",
            r"test_fuzz.*giants.*\[(2 million|90 MB of commas|an emoji in 15|one name of 79|an integer of|79 MB of|two million|"
            r"a shape of|an index of 90 MB|an index of 290|a config of 15 MB|150,000)",
            r"test_same_bytes.*killed.*\[settings2-3\]",
            r"test_verdicts.*scrambled_before_conversion.*\[(norms|w2)\]",
            r"remote/test_pull.*that_pass.*\[faults0-(backbone|meta)\]",
            r"remote/test_pull.*that_pass.*\[faults1-(backbone|all)\]",
            r"remote/test_pull.*unsafe_name.*\[(/etc/x|a//b|com1.txt|a\\\\b)",
            r"remote/test_pull.*never_taken.*\[(backbone-etag|all-html)",
            r"remote/test_streaming.*locally\[words(1|2)\]",
            r"test_recipes.*plans_flash\[(q8|q6|q3|bf16)\]",
            r"test_load_folders.*every_quantization.*\[bfloat16",
        ]
    )
)
