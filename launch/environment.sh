# Sourced by launch/quickstart and launch/test: finds a Python and makes a virtual
# environment with it. The system's Python is not changed.
#
#   SORA_ACCELERATOR  cpu, cuda or tpu, instead of detecting it (launch/install.py)

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# These belong to another Python than that of the environment.
unset PYTHONPATH PYTHONHOME

# base_python PYTHON MINOR: prints the base installation of PYTHON if that is a Python
# 3.MINOR that can create virtual environments, and fails otherwise.
base_python() {
  "$1" -I -c '
import ensurepip, sys, venv
if sys.version_info[:2] != (3, int(sys.argv[1])):
    sys.exit(1)
print(getattr(sys, "_base_executable", sys.executable))' "$2" 2>/dev/null
}

# find_python FOLDER MINOR...: prints the path of a Python 3.MINOR: the one of FOLDER, or
# else one on PATH, in pyenv or known to uv, preferring the first MINOR. As a last resort
# uv installs one.
find_python() {
  local folder=$1 minor candidate
  shift
  for minor in "$@"; do base_python "$folder/bin/python" "$minor" && return; done
  for minor in "$@"; do
    while IFS= read -r candidate; do
      base_python "$candidate" "$minor" && return
    done < <(
      type -ap "python3.$minor" python3 python || true
      compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor.*/bin/python" || true
      { command -v uv >/dev/null && uv python find "3.$minor" 2>/dev/null; } || true
    )
  done
  command -v uv >/dev/null && uv python install "3.$1" >&2 && uv python find "3.$1"
}

# make_environment FOLDER MINORS ARGUMENT...: makes FOLDER a virtual environment of a
# Python 3.MINOR by launch/install.py with these ARGUMENTs. If it is one already, this
# takes less than a tenth of a second.
make_environment() {
  local folder=$1 minors python
  read -ra minors <<<"$2"
  shift 2
  if [ -x "$folder/bin/python" ] &&
    "$folder/bin/python" -I "$root/launch/install.py" --check "$folder" "$@"; then
    return
  fi
  if ! python=$(find_python "$folder" "${minors[@]}"); then
    echo "Found no Python of version$(printf ' 3.%s' "${minors[@]}") (with its venv" \
      "module) on PATH, in pyenv or through uv; get one with your package manager" \
      "('apt-get install python3.${minors[0]}-venv'), with 'pyenv install" \
      "3.${minors[0]}', or by installing uv, and run this command again." >&2
    return 1
  fi
  "$python" -I "$root/launch/install.py" "$folder" "$@"
}

# The environment of everything but the peer libraries. Python 3.12 is preferred, since
# the results were measured with it.
make_main_environment() {
  local began=$SECONDS
  make_environment "$root/.venv" "12 13 14" --accelerator "$root/requirements.txt"
  export SORA_SETUP_SECONDS=$((SECONDS - began))
}
