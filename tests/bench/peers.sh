# Caisson and containerd side by side, for benchmarks. Sourced, after tests/critest/node.sh, by programs in scripts/bench.d
# that set: root (the repository), build (Caisson's programs), out (where logs go), and die (prints a message and ends).
# shellcheck shell=bash disable=SC2154

# Sets unpacked to a directory with these Debian packages, unpacked and not installed. It is made once: its name has
# their versions.
unpack_packages() {
  local cache=${CAISSON_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/caisson}/bench name=$1 versions new package
  shift
  versions=$(apt-cache show --no-all-versions "$@" | grep -E '^(Package|Version):') ||
    die "apt does not know all of the packages $*; run apt-get update"
  unpacked=$cache/$name-$(sha256sum <<<"$versions" | cut -c1-16)
  [[ ! -d $unpacked ]] || return 0
  mkdir -p "$cache"
  new=$(mktemp -d "$cache/tmp.XXXXXXXX")
  (cd "$new" && apt-get -q download "$@" >apt.log 2>&1) ||
    { tail -n 3 "$new/apt.log" >&2; rm -rf "$new"; die "$* cannot be downloaded; run apt-get update"; }
  for package in "$new"/*.deb; do dpkg-deb -x "$package" "$new/tree"; done
  mv -T "$new/tree" "$unpacked" 2>/dev/null || [[ -d $unpacked ]]
  rm -rf "$new"
}

# From here on programs of a tree that unpack_packages has made are found first; see with_libraries.
use_programs_of() {
  peer=$1
  export PATH=$peer/usr/bin:$peer/usr/sbin:$PATH
}

# Runs a program of that tree with the tree's libraries, and whatever it starts.
with_libraries() {
  LD_LIBRARY_PATH=${peer:+$peer/usr/lib/x86_64-linux-gnu:$peer/lib/x86_64-linux-gnu} "$@"
}

# Starts containerd with everything below $state and $run, with runc for pods that name no handler and crun for those with
# the handler `crun`. Its socket is $run/containerd.sock.
start_containerd() {
  local sandbox_image=$1 networks=$2
  cat >"$state/containerd.toml" <<TOML
version = 2
root = "$state/containerd"
state = "$run/containerd"
[debug]
level = "warn"
[grpc]
address = "$run/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "$sandbox_image"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "$networks"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun.options]
BinaryName = "crun"
TOML
  with_libraries containerd --config "$state/containerd.toml" >"$out/containerd.log" 2>&1 & jobs+=($!)
  wait_for containerd "$out/containerd.log" ctr --address "$run/containerd.sock" version
}

# Where the figures come from.
machine() {
  local kvm='with hardware virtualization'
  [[ -z ${KVM_LAB-} ]] || kvm='the KVM lab, a machine under software emulation'
  echo "- machine: $(nproc) processors ($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)), $(awk '/^MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo), $kvm; Linux $(uname -r)"
  echo "- Caisson: $("$build/caisson" --version), $(git -C "$root" describe --always --dirty 2>/dev/null || echo 'unknown revision')"
}

# What containerd runs containers with.
versions() {
  local tool
  for tool in "$@"; do
    case $tool in
      containerd) with_libraries containerd --version | cut -d' ' -f1,3 ;;
      *) with_libraries "$tool" --version | head -n 1 ;;
    esac
  done | paste -sd, | sed 's/^/- /; s/,/, /g'
}

# Both runtimes with everything below $state and $run, on bridges of their own, with an image of busybox that sleeps: the
# name of the image, and for Caisson alone, any word after it. microvm_settings are more lines of Caisson's configuration.
set_up_peers() {
  local image=$1 alone=${2-} number name names=(caisson containerd)
  state=$(mktemp -d /var/lib/caisson-bench.XXXXXXXX)
  run=$(mktemp -d /run/caisson-bench.XXXXXXXX)
  jobs=()
  trap tear_down_peers EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  [[ -z ${KVM_LAB-} ]] || mount --make-rshared /
  # Everything that hundreds of containers need of the kernel.
  ulimit -n "$(ulimit -Hn)"
  "$root/scripts/demo-image" "$state/image.tar" "$image" sleep 1000000
  for number in 0 1; do
    name=${names[number]}
    mkdir "$state/$name.d"
    cat >"$state/$name.d/10-bench.conflist" <<CNI
{ "cniVersion": "0.4.0", "name": "$name-bench", "plugins": [
  { "type": "bridge", "bridge": "caisson-bench$number", "isGateway": true, "ipMasq": false,
    "ipam": { "type": "host-local", "dataDir": "$state/ipam-$name",
      "ranges": [[{ "subnet": "10.8$number.0.0/16" }]], "routes": [{ "dst": "0.0.0.0/0" }] } } ] }
CNI
  done
  cat >"$state/config.toml" <<TOML
root = "$state/caisson"
state = "$run/caisson"
socket = "$run/caisson.sock"
cgroup_parent = "/caisson-bench"
log_level = "warn"
allow_host = true
[microvm]
vcpus = 1
${microvm_settings-}
[cni]
conf_dir = "$state/caisson.d"
TOML
  "$build/caisson" --config "$state/config.toml" serve >"$out/caisson.log" 2>&1 & jobs+=($!)
  wait_for "Caisson" "$out/caisson.log" "$build/caisson" --config "$state/config.toml" images
  "$build/caisson" --config "$state/config.toml" load --name "$image" "$state/image.tar" >/dev/null
  [[ -z $alone ]] || return 0
  start_containerd "$image" "$state/containerd.d"
  ctr --address "$run/containerd.sock" --namespace k8s.io images import --base-name "${image%:*}" "$state/image.tar" >/dev/null
}

# shellcheck disable=SC2317  # called by the trap
tear_down_peers() {
  local code=$? job
  trap '' INT TERM
  ((code == 0)) || tail -n 5 "$out"/{caisson,containerd}.log >&2 2>/dev/null || true
  # A lab vanishes with everything in it.
  [[ -z ${KVM_LAB-} ]] || exit "$code"
  for ((job = ${#jobs[@]} - 1; job >= 0; job--)); do
    kill "${jobs[job]}" 2>/dev/null || true
    wait "${jobs[job]}" 2>/dev/null || true
  done
  cut -d' ' -f5 /proc/self/mountinfo | { grep -e "^$state/" -e "^$run/" || true; } | tac | xargs -r umount -l 2>/dev/null || true
  ip link delete caisson-bench0 2>/dev/null || true
  ip link delete caisson-bench1 2>/dev/null || true
  rmdir /sys/fs/cgroup/caisson-bench 2>/dev/null || true
  rm -rf --one-file-system "$state" "$run"
  exit "$code"
}
