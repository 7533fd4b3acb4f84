# Usage: worker.sh install | run NUMBER | train NUMBER | stop
#
# The training is a unit of systemd: it outlives the ssh connection, and when the VM is shut down, by a preemption too, systemd
# sends it SIGTERM and waits for it to save.
set -euo pipefail
ROOT="$HOME/$NAME"
CHECKOUT="$ROOT/checkout"
STATUS="$ROOT/status"
LOG="$ROOT/log"
UNIT="train-$NAME"

mount_bucket() {
  local where="/gcs/$BUCKET"
  if mountpoint --quiet "$where"; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc release
    release="$(lsb_release --codename --short)"
    curl --fail --silent --show-error https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$release main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update --quiet
    sudo apt-get install --quiet --yes gcsfuse
  fi
  sudo mkdir -p "$where"
  sudo chown "$(id -u):$(id -g)" "$where"
  gcsfuse --implicit-dirs "$BUCKET" "$where"
}

install_checkout() {
  mkdir -p "$ROOT"
  mount_bucket
  if [ ! -d "$CHECKOUT/.git" ]; then git clone --quiet -- "$REPOSITORY" "$CHECKOUT"; fi
  cd "$CHECKOUT"
  git fetch --quiet --tags origin
  git checkout --quiet --detach "origin/$REVISION" 2>/dev/null || git checkout --quiet --detach "$REVISION"
  # The image's own Python is older than the project needs.
  python3 -m pip install --quiet --user uv
  local uv="$HOME/.local/bin/uv"
  if [ ! -x .venv/bin/python ]; then "$uv" venv --quiet --python 3.11 .venv; fi
  "$uv" pip install --quiet --python .venv/bin/python --requirement requirements.txt "jax[tpu]"
  "$uv" pip install --quiet --python .venv/bin/python --no-deps --editable .
  export PATH="$CHECKOUT/.venv/bin:$PATH"
  prepare
}

alive() {
  case "$(systemctl is-active "$UNIT" || true)" in
    active | activating | deactivating | reloading) return 0 ;;
  esac
  return 1
}

# gcloud starts this again when a connection breaks: it then goes on watching.
run() {
  mount_bucket
  touch "$LOG"
  tail --follow=name --lines=0 --pid="$$" "$LOG" &
  local watcher=$!
  if ! alive; then
    sudo systemctl reset-failed "$UNIT" 2>/dev/null || true
    rm -f "$STATUS"
    # TPUs read from locked memory; a unit may lock little by default.
    sudo systemd-run --quiet --unit="$UNIT" --uid="$(id -u)" --gid="$(id -g)" --setenv=HOME="$HOME" \
      --property=TimeoutStopSec="$GRACE_SECONDS" --property=LimitMEMLOCK=infinity \
      --property=StandardOutput="append:$LOG" --property=StandardError="append:$LOG" \
      -- /bin/bash "$(realpath "$0")" train "$1"
  fi
  while alive; do sleep "${LAUNCH_PAUSE:-5}"; done
  kill "$watcher" || true
  # No status: it was killed.
  if [ ! -f "$STATUS" ]; then return "$STOPPED_STATUS"; fi
  return "$(cat "$STATUS")"
}

train() {
  RUN="$1"
  select_command
  cd "$CHECKOUT"
  export PATH="$CHECKOUT/.venv/bin:$PATH"
  # systemd signals this shell too; with a trap it lives on, to write down how the training ended.
  trap : TERM
  local status=0
  "${COMMAND[@]}" || status=$?
  echo "$status" >"$STATUS.new"
  mv "$STATUS.new" "$STATUS"
  return "$status"
}

stop() { sudo systemctl stop "$UNIT" 2>/dev/null || true; }

case "${1:-}" in
  install)
    # Not the status of a mistake in the training, whatever failed: it may pass.
    trap 'exit $(($? != 0))' EXIT
    install_checkout
    ;;
  run) run "$2" ;;
  train) train "$2" ;;
  stop) stop ;;
  *)
    echo "usage: $0 install | run NUMBER | train NUMBER | stop" >&2
    exit "$MISTAKE_STATUS"
    ;;
esac
