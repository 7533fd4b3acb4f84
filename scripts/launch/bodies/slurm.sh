stopped=0
interrupted=0

ask_to_save() {
  interrupted=1
  if [ "$stopped" = 1 ]; then return; fi
  stopped=1
  echo "launch: SIGTERM; the processes are asked to save"
  # Not `kill` of srun: it answers SIGTERM by killing its tasks. scancel signals the steps alone, not this shell.
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap ask_to_save TERM

cd -- "$CHECKOUT" || exit "$MISTAKE_STATUS"
set -e
prepare
set +e

status="$STOPPED_STATUS"
if [ "$stopped" = 0 ]; then
  # A process that stops after saving ends before others have: that must not kill them.
  srun --kill-on-bad-exit=0 "${COMMAND[@]}" &
  step=$!
  while :; do
    interrupted=0
    wait "$step"
    status=$?
    # A trap ends `wait` with a status that is not the step's.
    if [ "$interrupted" = 0 ]; then break; fi
  done
fi

case "$status" in
  0) exit 0 ;;
  "$MISTAKE_STATUS") echo "launch: a mistake in the command or its data: not requeued"; exit "$status" ;;
esac
restarts="${SLURM_RESTART_COUNT:-0}"
if [ "$restarts" -ge "$MAX_RESTARTS" ]; then
  echo "launch: status $status after $restarts restarts: not requeued"
  exit "$status"
fi
echo "launch: status $status; requeued, restart $((restarts + 1)) of at most $MAX_RESTARTS"
scontrol requeue "$SLURM_JOB_ID" || exit "$status"
exit 0
