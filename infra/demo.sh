#!/usr/bin/env bash
# The whole product on real captioned pictures, through its own commands. Run it with `make demo`.
# Rerunning it does only what is left; `make clean` starts over.
set -euo pipefail
began=$SECONDS
times=()

step() { # prints a command, runs it, remembers how long it took
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    local start=$SECONDS
    "$@"
    times+=("$(printf '%4d s  %s' $((SECONDS - start)) "$*")")
}

# Tracebacks and warnings of libraries that concern nobody here stay out of the way.
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false

step pipeline run download --source openmoji
step pipeline run caption
step pipeline run encode --vae tiny4
step pipeline status
step composer training/train.py yamls/demo.yaml
step python -m training.generate --checkpoint runs/demo --out out/prompts \
    --prompts "avocado on a blue background" "red heart on a white background" \
    "penguin on an orange background" "rocket on a purple background"
step python -m training.scores --checkpoint runs/demo --out out/demo

printf '\nTime each step took:\n'
printf '  %s\n' "${times[@]}"
printf '  %4d s  in all (installation not counted)\n' $((SECONDS - began))
printf '\nLook at out/demo/train.png and out/demo/heldout.png (each generated picture beside the\n'
printf 'decoded latent of the same caption) and at out/prompts/sheet.png.\n'
printf 'Pictures: OpenMoji (openmoji.org), CC BY-SA 4.0.\n'
