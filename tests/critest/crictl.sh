#!/usr/bin/env bash
# A day with crictl against a running daemon: each command is run as a person would, and what it prints is looked at.
#
#   tests/critest/crictl.sh CRICTL SOCKET DIR HANDLER
#
# DIR is an empty directory for its files. Prints a line a step; status 1 if one failed. scripts/critest prepares the node
# and calls this.
set -uo pipefail

crictl=$1 socket=$2 dir=$3 handler=$4
image=registry.k8s.io/e2e-test-images/busybox:1.29-2
passed=0 failed=0

program=("$crictl" --config "$dir/empty.yaml" --timeout 120s --runtime-endpoint "unix://$socket" --image-endpoint "unix://$socket")
crictl() { "${program[@]}" "$@"; }

# step NAME PATTERN COMMAND...: the command succeeds, and its output matches the extended regular expression.
step() {
  local name=$1 pattern=$2 said
  shift 2
  if said=$("$@" 2>&1 </dev/null) && grep -Eq -- "$pattern" <<<"$said"; then
    echo "ok      crictl $name"
    ((passed += 1))
  else
    echo "FAILED  crictl $name: no $pattern in: ${said:0:600}"
    ((failed += 1))
  fi
}

# One request through a forwarded port.
forwarded() {
  local client code=1
  # The program itself, not the function: a shell around it would be what is killed, and the port be kept.
  "${program[@]}" port-forward "$pod" 18082:8080 >"$dir/forward" 2>&1 & client=$!
  for _ in $(seq 100); do
    curl -sf --max-time 10 http://127.0.0.1:18082/ && { code=0; break; }
    sleep 0.2
  done
  kill "$client" 2>/dev/null
  wait "$client" 2>/dev/null
  # What the client said, for whoever asks why.
  ((code == 0)) || cat "$dir/forward"
  return "$code"
}

mkdir -p "$dir/logs"
: >"$dir/empty.yaml"
cat >"$dir/pod.json" <<JSON
{ "metadata": { "name": "web", "namespace": "default", "uid": "crictl-$handler", "attempt": 0 }, "hostname": "web",
  "labels": { "app": "web" }, "log_directory": "$dir/logs", "linux": {} }
JSON
cat >"$dir/container.json" <<JSON
{ "metadata": { "name": "server" }, "image": { "image": "$image" }, "log_path": "server.log", "labels": { "tier": "front" },
  "command": ["sh", "-c", "mkdir /www; echo served >/www/index.html; echo ready; exec httpd -f -p 8080 -h /www"],
  "linux": { "resources": { "memory_limit_in_bytes": 67108864 } } }
JSON

step "version" 'RuntimeName: +caisson' crictl version
step "info" 'NetworkReady' crictl info
step "pull" 'Image is up to date for ' crictl pull "$image"
step "images" 'e2e-test-images/busybox +1.29-2' crictl images
step "inspecti" "$image" crictl inspecti "$image"
step "imagefsinfo" 'usedBytes' crictl imagefsinfo
pod=$(crictl runp --runtime "$handler" "$dir/pod.json" 2>"$dir/error") || { echo "FAILED  crictl runp: $(tail -n 1 "$dir/error")"; exit 1; }
container=$(crictl create "$pod" "$dir/container.json" "$dir/pod.json" 2>"$dir/error") ||
  { echo "FAILED  crictl create: $(tail -n 1 "$dir/error")"; crictl rmp -f "$pod"; exit 1; }
step "ps, created" 'Created +server' crictl ps --all
step "start" "$container" crictl start "$container"
step "pods" 'Ready +web' crictl pods --label app=web
step "ps" 'Running +server' crictl ps --label tier=front
for _ in $(seq 100); do ! grep -q ready "$dir/logs/server.log" || break; sleep 0.2; done
step "logs" '^ready$' crictl logs "$container"
step "inspect" '"state": "CONTAINER_RUNNING"' crictl inspect "$container"
step "inspectp" '"state": "SANDBOX_READY"' crictl inspectp "$pod"
step "exec, synchronous" '^web$' crictl exec --sync "$container" hostname
step "exec, streamed over SPDY" '^web$' crictl exec --transport spdy "$container" hostname
step "exec, streamed over WebSocket" '^web$' crictl exec --transport websocket "$container" hostname
step "port-forward" '^served$' forwarded
step "update" "$container" crictl update --memory 100663296 "$container"
step "update is shown" '"memoryLimitInBytes": "100663296"' crictl inspect "$container"
step "stats" "^${container:0:13} +server +[0-9.]+ +[0-9.]+[kM]?B" crictl stats "$container"
step "statsp" "^web +${pod:0:13}" crictl statsp "$pod"
step "metricdescs" 'container_cpu' crictl metricdescs
step "metricsp" "$pod" crictl metricsp
step "stop" "$container" crictl stop --timeout 1 "$container"
step "ps, stopped" 'Exited +server' crictl ps --all
step "rm" "$container" crictl rm "$container"
step "stopp" "$pod" crictl stopp "$pod"
step "pods, stopped" 'NotReady +web' crictl pods
step "rmp" "$pod" crictl rmp "$pod"
step "rmi" 'Deleted: ' crictl rmi "$image"
echo "crictl, handler $handler: $passed passed, $failed failed"
[[ $failed -eq 0 ]]
