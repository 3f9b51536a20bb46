"""The stages of gpu.sh, one module each: ``python3 -m benchmarks.gpu.<stage> FOLDER [--rehearse]``.

Every stage appends JSON lines to FOLDER/harvest.jsonl while it works, so what it found before its
time was up is not lost.
"""
