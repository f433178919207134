#!/usr/bin/env bash
# Makes .venv with the packages pinned in requirements.txt, unless that has been done for the same pins (by content).
# The Makefile calls it: `setup.sh "python3.11 python3"`, candidates in order of preference. Safe to interrupt and repeat.
set -euo pipefail
cd "$(dirname "$0")"
venv=.venv
log=$venv/install.log

stop() { echo "error: $1" >&2; exit 1; }

if nvidia-smi -L >/dev/null 2>&1; then faiss=faiss-gpu other=faiss-cpu; else faiss=faiss-cpu other=faiss-gpu; fi
# The folder counts, because scripts in .venv and the editable install name it.
key=$({ cat requirements*.txt pyproject.toml; echo "$faiss $PWD"; } | sha256sum | cut -c1-16)
mkdir -p $venv || stop "cannot write to $PWD; check the permissions and the free space"
exec 9<$venv
flock 9  # a second make waits here for the first
[ "$(cat $venv/.ready 2>/dev/null)" = "$key" ] && exit 0
rm -f $venv/.ready

python=
for candidate in $1; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
done
[ -n "$python" ] || stop "no Python 3.11 or newer among: $1; install python3.11 or name one: make paper PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    stop "$python cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3.11-venv)"
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
[ "$(version "$python")" = 3.11 ] || echo "note: the pins were chosen for Python 3.11, this is $(version "$python")"

# An environment that was cut off while it was made, or made by another Python, is made again.
if ! $venv/bin/python -m pip --version >/dev/null 2>&1 || [ "$(version $venv/bin/python)" != "$(version "$python")" ]; then
    "$python" -m venv --clear $venv || stop "$python -m venv $venv failed; the lines above say why"
fi

cp requirements.txt $venv/requirements.txt
[ $faiss = faiss-cpu ] || { grep -v '^faiss-cpu==' requirements.txt; cat requirements-gpu.txt; } >$venv/requirements.txt
echo "installing $(grep -c == $venv/requirements.txt) packages into $venv (1 to 4 minutes, about 2 GB, more with CUDA; log in $log)"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
pip=("$venv/bin/python" -m pip)
{
    # Both distributions install the module faiss: removing the wrong one takes files of the right one along.
    if "${pip[@]}" show -q $other 2>/dev/null; then "${pip[@]}" uninstall -y $other $faiss; fi &&
        "${pip[@]}" install -r $venv/requirements.txt &&
        "${pip[@]}" install --no-deps --no-build-isolation -e .
} >$log 2>&1 </dev/null || {
    tail -n 15 $log >&2
    stop "the installation failed: last lines above, all of it in $log. Check network and free space (df -h .), then run the same command again"
}
echo "$key" >$venv/.ready
