mkdir -p /tmp/site/lightning_hetero-0.1.0.dev0.dist-info; printf "Metadata-Version: 2.1\nName: lightning-hetero\nVersion: 0.1.0.dev0\n" > /tmp/site/lightning_hetero-0.1.0.dev0.dist-info/METADATA; export PYTHONPATH=$PWD:/tmp/site PYTHONUNBUFFERED=1
printf '[pytest]\n' > $OUT/p.ini
timeout ${1:-200} python3 -m pytest -c $OUT/p.ini --rootdir=. --import-mode=importlib -p no:cacheprovider -p no:xdist -q --tb=short tests/cuda > $OUT/tests.log 2>&1
timeout ${2:-170} python3 benchmarks/gpu.py --rounds 5 --out $OUT/r > $OUT/bench.log 2>&1
grep -E "^E  |passed|failed|^FAILED" $OUT/tests.log | cut -c1-300 | tail -c 6000
tail -c 4500 $OUT/bench.log
