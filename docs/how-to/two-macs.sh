#!/bin/bash
# Convert on this Mac and another one, into a folder that both see under the same name.
#
#   OTHER=studio.local SRC=/Volumes/models/DeepSeek-V4-Pro OUT=/Volumes/models/pro-q2 OPTIONS="--recipe q2" ./two-macs.sh
#
# On the other Mac `ssh OTHER ds4convert --version` has to answer; DS4 names the program there if it is not on its PATH.
set -euo pipefail
: "${OTHER:?the name of the other Mac}" "${SRC:?}" "${OUT:?}" "${OPTIONS:=}" "${DS4:=ds4convert}"

here=$(ds4convert --version) there=$(ssh "$OTHER" "$DS4 --version")
[ "$here" = "$there" ] || { echo "here: $here, there: $there; both have to be the same" >&2; exit 2; }

ssh "$OTHER" "$DS4 quantize $(printf %q "$SRC") $(printf %q "$OUT") $OPTIONS --part 2/2" &
other=$!
trap 'kill $other 2>/dev/null' EXIT
# shellcheck disable=SC2086 # OPTIONS are several words
ds4convert quantize "$SRC" "$OUT" $OPTIONS --part 1/2
wait $other || echo "the other Mac did not finish its part; this one does it now" >&2
trap - EXIT
# shellcheck disable=SC2086
ds4convert quantize "$SRC" "$OUT" $OPTIONS
