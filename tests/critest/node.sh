# A node for a client of CRI that is not our own: images, a registry, a network and a daemon. Sourced by scripts/critest
# and scripts/kubelet-check, which set: root (the repository), build (Caisson's programs), out (where logs go), and
# die (prints a message and ends).
# shellcheck shell=bash disable=SC2154

port=5000

# Fails early where something is missing that the whole needs.
require_node_tools() {
  [[ -x $build/caisson ]] || die "$build has no caisson; run scripts/build"
  [[ $(id -u) -eq 0 ]] || die "must be root (networks, mounts and KVM)"
  for tool in docker-registry curl python3 gcc; do
    command -v "$tool" >/dev/null || die "$tool is missing; run scripts/setup"
  done
}

# Sets images to the directory with the images, which is made once: its name has all it depends on.
find_images() {
  local cache=${CAISSON_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/caisson}/critest key new
  key=$({
    cat "$root/tests/critest/images.py" "$root/tests/critest/tools.c"
    apt-cache show --no-all-versions busybox libc6 nginx | grep -E '^(Package|Version):'
  } | sha256sum | cut -c1-32) || die "apt knows no package busybox, libc6 or nginx; run apt-get update"
  images=$cache/$key
  [[ ! -d $images ]] || return 0
  echo "making the test images, once"
  mkdir -p "$cache"
  new=$(mktemp -d "$cache/tmp.XXXXXXXX")
  "$root/tests/critest/images.py" "$new/images" || { rm -rf "$new"; die "the images could not be made"; }
  mv -T "$new/images" "$images" 2>/dev/null || [[ -d $images ]]
  rm -rf "$new"
}

# Runs this script's second half, with --node IMAGES, where KVM works. lab_words are for the lab's kernel command line.
run_where_kvm_works() {
  local limit=$1
  shift
  mkdir -p "$out"
  if "$build/caisson" doctor --kvm-works >&2; then
    timeout --foreground -k 30 "$limit" "$@"
  else
    "$root/scripts/kvm-lab" --mem "${CAISSON_LAB_MEM:-8G}" --append "${lab_words-}" --timeout "$limit" --cwd "$root" --out "$out" -- "$@"
  fi
}

# Everything of the node is below $state and $run, but for the bridge and the cgroup. The daemon's socket is $socket.
set_up_node() {
  local images=$1 mirror="127.0.0.1:$port"
  state=$(mktemp -d /var/lib/caisson-node.XXXXXXXX)
  run=$(mktemp -d /run/caisson-node.XXXXXXXX)
  socket=$run/caisson.sock
  bridge=caisson-node0
  jobs=()
  trap tear_down_node EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  # As systemd has it on a node.
  [[ -z ${KVM_LAB-} ]] || mount --make-rshared /

  mkdir "$state/net.d" "$state/tmp"
  cat >"$state/net.d/10-node.conflist" <<CNI
{ "cniVersion": "1.0.0", "name": "caisson-node", "plugins": [
  { "type": "bridge", "bridge": "$bridge", "isGateway": true, "ipMasq": true, "hairpinMode": true,
    "ipam": { "type": "host-local", "dataDir": "$state/ipam",
      "ranges": [[{ "subnet": "10.88.0.0/16" }]], "routes": [{ "dst": "0.0.0.0/0" }] } },
  { "type": "portmap", "capabilities": { "portMappings": true } } ] }
CNI
  cat >"$state/config.toml" <<TOML
root = "$state/root"
state = "$run"
socket = "$socket"
cgroup_parent = "/caisson-node"
log_level = "${CAISSON_LOG:-info}"
allow_host = true
[handlers]
microvm = "microvm"
host = "host"
[microvm]
vcpus = 1
templates = $([[ -n ${CAISSON_TEMPLATES-} ]] && echo true || echo false)
[cni]
conf_dir = "$state/net.d"
[images]
certs_dir = "$state/certs.d"
TOML
  # Every registry's images come from the one here.
  mkdir -p "$state/certs.d/_default"
  echo "[host.\"http://$mirror\"]" >"$state/certs.d/_default/hosts.toml"
  cat >"$state/registry.yaml" <<YAML
version: 0.1
log: ${CAISSON_REGISTRY_LOG:-{ level: warn \}}
storage: { filesystem: { rootdirectory: $images/registry } }
http: { addr: "$mirror" }
YAML
  docker-registry serve "$state/registry.yaml" >"$out/registry.log" 2>&1 & jobs+=($!)
  wait_for "docker-registry" "$out/registry.log" curl -sf "http://$mirror/v2/"
  "$build/caisson" --config "$state/config.toml" serve >"$out/daemon.log" 2>&1 & jobs+=($!)
  wait_for "the daemon" "$out/daemon.log" "$build/caisson" --config "$state/config.toml" images
}

# Waits until the job that was started last answers the command.
wait_for() {
  local name=$1 log=$2 count
  shift 2
  for ((count = 0; count < 600; count++)); do
    ! "$@" >/dev/null 2>&1 || return 0
    kill -0 "${jobs[-1]}" 2>/dev/null || { tail -n 20 "$log" >&2; die "$name ended"; }
    sleep 0.1
  done
  tail -n 20 "$log" >&2
  die "$name did not answer within 60 s"
}

# shellcheck disable=SC2317  # called by the trap
tear_down_node() {
  local code=$? job
  trap '' INT TERM
  # The last first: a client before its daemon.
  for ((job = ${#jobs[@]} - 1; job >= 0; job--)); do
    kill "${jobs[job]}" 2>/dev/null || true
    wait "${jobs[job]}" 2>/dev/null || true
  done
  # What a failed test left mounted, the deepest first.
  cut -d' ' -f5 /proc/self/mountinfo | { grep -e "^$state/" -e "^$run/" || true; } | tac | xargs -r umount -l 2>/dev/null || true
  ip link delete "$bridge" 2>/dev/null || true
  rmdir /sys/fs/cgroup/caisson-node 2>/dev/null || true
  rm -rf --one-file-system "$state" "$run"
  exit "$code"
}
