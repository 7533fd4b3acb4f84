set -uo pipefail
HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
PAUSE="${LAUNCH_PAUSE:-60}"  # seconds between looks at the slice

say() { echo "launch: $(date -u +%FT%TZ) $*"; }

tpu() {
  local verb="$1"
  shift
  gcloud compute tpus tpu-vm "$verb" "$@" --project="$PROJECT" --zone="$ZONE" --quiet
}

# READY, PREEMPTED, ...; empty if there is no such slice; fails if gcloud does.
state() { tpu list --filter="name ~ /$NAME\$" --format="value(state)"; }

# A host that vanished says nothing: without the keep-alive, ssh would wait for it for ever.
on_every_host() {
  tpu ssh "$NAME" --worker=all --command="bash worker-$NAME.sh $*" \
    --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4
}

make_ready() {
  local attempts=0 now
  while :; do
    now="$(state)" || now=SILENT
    case "$now" in
      READY) return 0 ;;
      "")
        if [ "$attempts" -ge "$CREATE_ATTEMPTS" ]; then
          say "no slice after $attempts attempts"
          return 1
        fi
        attempts=$((attempts + 1))
        say "creating $NAME, attempt $attempts of $CREATE_ATTEMPTS"
        tpu create "$NAME" "${CREATE_OPTIONS[@]}" || sleep "$PAUSE"
        ;;
      PREEMPTED | TERMINATED | STOPPED | UNKNOWN)  # UNKNOWN: after a failed repair.
        say "$NAME is $now: deleting it, to create it anew"
        tpu delete "$NAME" || sleep "$PAUSE"
        ;;
      SILENT)
        attempts=$((attempts + 1))
        if [ "$attempts" -ge "$CREATE_ATTEMPTS" ]; then
          say "gcloud does not answer"
          return 1
        fi
        sleep "$PAUSE"
        ;;
      *)  # CREATING, STARTING, REPAIRING, DELETING: these pass.
        say "$NAME is $now: waiting"
        sleep "$PAUSE"
        ;;
    esac
  done
}

attempt() {
  tpu scp "$HERE/worker.sh" "$NAME:worker-$NAME.sh" --worker=all || return 1
  # Hosts that go on without one that failed are stopped before all start together.
  on_every_host stop || return 1
  on_every_host install || return 1
  on_every_host run "$1"
}

finish() {
  if [ "$DELETE_WHEN_DONE" = 1 ]; then
    say "deleting $NAME"
    tpu delete "$NAME" || say "could not delete $NAME: it goes on costing"
  else
    say "$NAME is left running, and goes on costing"
  fi
  exit "$1"
}

trap 'say "interrupted; $NAME is left as it is, and goes on costing"; exit 130' INT TERM

restarts=0
for ((run = 0; run < RUNS; run++)); do
  while :; do
    make_ready || finish 1
    say "run $run on $NAME"
    attempt "$run"
    status=$?
    if [ "$status" = 0 ]; then break; fi
    if [ "$status" = "$MISTAKE_STATUS" ]; then
      say "run $run: a mistake in the command or its data: not started again"
      finish "$status"
    fi
    if [ "$restarts" -ge "$MAX_RESTARTS" ]; then
      say "run $run: status $status after $restarts restarts"
      finish "$status"
    fi
    restarts=$((restarts + 1))
    say "run $run: status $status; restart $restarts of at most $MAX_RESTARTS"
    sleep "$PAUSE"
  done
done
say "done"
finish 0
