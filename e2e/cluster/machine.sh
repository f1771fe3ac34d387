# A machine out of namespaces: its own mounts, processes, cgroups, host name, and the network of a
# namespace that is there already. All its processes end with the first, and every mount lies in its
# mount namespace: with that process goes everything but empty cgroups and what is on its disk.
#
#   machine.sh start NETNS NAME DISK [ROOT]   becomes the machine; DISK/init.pid appears when it is up
#   machine.sh enter NETNS PID COMMAND…       runs a command in it
#
# NETNS names the network namespace and the cgroups. DISK, a directory below /run, holds what outlives a
# loss of power: all that the machine writes to /etc, /opt and /var. Its parent is seen inside under the
# same name; all else below /run is the machine's own and in memory. ROOT/usr is mounted over /usr: a newer
# container runtime with its libraries.
set -eu

# Every hierarchy of cgroups: its directory below /sys/fs/cgroup and the options to mount it.
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
            # Without processors and memory of its own, a cpuset takes no process.
            for file in cpuset.cpus cpuset.mems; do
                parent=/sys/fs/cgroup/$hierarchy/$file
                [ ! -e "$parent" ] || cat "$parent" >"$cgroup/$file"
            done
        fi
        echo $$ >"$cgroup/cgroup.procs"
    done
}

# Shows another value than the host's, where a kubelet would change it for the whole host.
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
    # As the host numbers it: /proc is still the host's.
    read -r pid _ </proc/self/stat
    # Nobody else's namespaces are to live as long as this machine.
    umount --recursive /run/netns 2>/dev/null || true
    mount -t proc proc /proc

    # The new /run is put together elsewhere, because the disk lies below the old one.
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
    # Overlays do not lie on overlays; and these are empty whatever the host has there.
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
    # Nodes are told apart by it.
    echo "$name" | md5sum | cut -c1-32 >/etc/machine-id
    # As an init does it: mounts of pods are to be seen by the machine, and the other way round.
    mount --make-rshared /
    echo "$pid" >"$disk/init.new"
    mv "$disk/init.new" "$disk/init.pid"
    # A shell that waits takes in the orphans of all others.
    sleep infinity &
    wait
    ;;
esac
