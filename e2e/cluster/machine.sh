# A machine made of namespaces: its own mounts, processes, cgroups and host name, and the network of an
# existing network namespace. The kernel kills all its processes together with the first one. Then only
# empty cgroups and the disk remain, because every mount is in the machine's mount namespace.
#
#   machine.sh start NETNS NAME DISK [ROOT]   become the machine; DISK/init.pid is written when it runs
#   machine.sh enter NETNS PID COMMAND…       run a command in the machine
#
# NETNS is the name of the network namespace and of the cgroups. DISK is a directory below /run that
# outlives a loss of power: the machine's changes of /etc, /opt and /var. The machine sees the parent of
# DISK under the same path. Everything else below /run belongs to the machine and is in memory. ROOT/usr
# is mounted over /usr: a newer container runtime with its libraries.
set -eu

# Prints every cgroup hierarchy: its directory below /sys/fs/cgroup and its mount options.
hierarchies() {
    while IFS=: read -r _ controllers _; do
        case $controllers in
        "") ;;
        name=*) echo "${controllers#name=} none,$controllers" ;;
        *) echo "$controllers $controllers" ;;
        esac
    done </proc/self/cgroup
}

# Moves this process into the machine's cgroups.
join() {
    hierarchies | while read -r hierarchy _; do
        cgroup=/sys/fs/cgroup/$hierarchy/$1
        if [ ! -d "$cgroup" ]; then
            mkdir "$cgroup"
            # A cpuset accepts no process while its lists of CPUs and memory nodes are empty.
            for file in cpuset.cpus cpuset.mems; do
                parent=/sys/fs/cgroup/$hierarchy/$file
                [ ! -e "$parent" ] || cat "$parent" >"$cgroup/$file"
            done
        fi
        echo $$ >"$cgroup/cgroup.procs"
    done
}

# Hides a setting of the host behind a file with another value. A kubelet would change the setting for
# the whole host.
pretend() { # NAME VALUE
    echo "$2" >"/run/sysctl-${1##*/}"
    mount --bind "/run/sysctl-${1##*/}" "/proc/sys/$1"
}

case $1 in
start)
    if [ -z "$(hierarchies)" ]; then
        echo "this host has no cgroups of version 1, which the machines need" >&2
        exit 1
    fi
    join "$2"
    exec nsenter "--net=/run/netns/$2" \
        unshare --cgroup --mount --ipc --uts --pid --fork --kill-child /bin/sh "$0" init "$3" "$4" "${5-}"
    ;;
enter)
    join "$2"
    pid=$3
    shift 3
    exec nsenter "--target=$pid" --mount --net --pid --cgroup --ipc --uts -- "$@"
    ;;
init)
    name=$2 disk=$3 root=$4
    hierarchies=$(hierarchies)
    # The process id in the host's numbering, because /proc is still the host's.
    read -r pid _ </proc/self/stat
    # These mounts would keep other network namespaces alive as long as this machine.
    umount --recursive /run/netns 2>/dev/null || true
    mount -t proc proc /proc

    # The new /run is assembled elsewhere, because the disk is below the old one.
    mkdir -p "$disk/run"
    mount -t tmpfs -o mode=755 tmpfs "$disk/run"
    laboratory=${disk%/*}
    inside=$disk/run/${laboratory#/run/}
    mkdir -p "$disk/run/lock" "$disk/run/netns" "$inside"
    mount --bind "$laboratory" "$inside"
    [ -z "$root" ] || mount -t overlay -o "lowerdir=$root/usr:/usr" overlay /usr
    for top in etc opt var; do
        mkdir -p "$disk/layers/$top" "$disk/layers/.$top"
        layers=upperdir=$disk/layers/$top,workdir=$disk/layers/.$top
        mount -t overlay -o "lowerdir=/$top,$layers" overlay "/$top"
    done
    # An overlay cannot be the upper layer of another overlay (containerd's). These directories are also
    # empty, whatever the host has there.
    for path in etc/kubernetes etc/cni/net.d opt/cni/bin var/lib/kubelet var/lib/containerd; do
        mkdir -p "$disk/$path" "/$path"
        mount --bind "$disk/$path" "/$path"
    done
    mount --no-mtab --move "$disk/run" /run

    umount --recursive /sys/fs/cgroup
    mount -t sysfs sysfs /sys
    mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
    echo "$hierarchies" | while read -r hierarchy options; do
        mkdir "/sys/fs/cgroup/$hierarchy"
        mount -t cgroup -o "$options" cgroup "/sys/fs/cgroup/$hierarchy"
    done

    pretend vm/overcommit_memory 1
    pretend vm/panic_on_oom 0
    pretend kernel/panic 10
    pretend kernel/panic_on_oops 1
    pretend kernel/keys/root_maxkeys 1000000
    pretend kernel/keys/root_maxbytes 25000000
    for key in ipv4/ip_forward ipv6/conf/all/forwarding; do echo 1 >"/proc/sys/net/$key"; done

    hostname "$name"
    echo "$name" >/etc/hostname
    printf '127.0.0.1 localhost\n::1 localhost\n' >/etc/hosts
    rm -f /etc/resolv.conf
    echo "# no name server" >/etc/resolv.conf
    # Kubernetes distinguishes nodes by the machine id.
    echo "$name" | md5sum | cut -c1-32 >/etc/machine-id
    # Mounts propagate between the machine and its pods, as on a machine with an init.
    mount --make-rshared /
    echo "$pid" >"$disk/init.new"
    mv "$disk/init.new" "$disk/init.pid"
    # The waiting shell reaps orphaned processes.
    sleep infinity &
    wait
    ;;
esac
