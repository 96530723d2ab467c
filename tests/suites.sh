#!/usr/bin/env bash
# Runs suites of end-to-end tests one after the other, for scripts/test, in a lab: its start takes as long as a short suite.
#
#   tests/suites.sh QUEUE MOST SECONDS
#
# QUEUE has a file ID.waiting for each suite that waits: the directory that it runs in, and below that its command, as the
# shell takes it. Other labs take theirs from the same queue: who renames it to ID.taken has it. What the suite says is then
# in ID.log, and in ID.code its exit status and how many seconds it took. No more than MOST are taken, and none runs for more
# than SECONDS.
set -euo pipefail

queue=$1 most=$2 limit=$3
# Suites turn the clock.
up() { cut -d . -f 1 /proc/uptime; }
for waiting in "$queue"/*.waiting; do
  ((most > 0)) || break
  suite=${waiting%.waiting}
  # Another lab may have taken it.
  mv "$waiting" "$suite.taken" 2>/dev/null || continue
  most=$((most - 1)) start=$(up) code=0
  { read -r directory; read -r command; } <"$suite.taken"
  (cd "$directory" && eval "exec timeout -k 10 $limit $command") >"$suite.log" 2>&1 </dev/null || code=$?
  echo "$code $(($(up) - start))" >"$suite.code.new"
  mv "$suite.code.new" "$suite.code"
  # What the lab has in its caches is memory of the machine that it runs on.
  echo 3 >/proc/sys/vm/drop_caches
done
