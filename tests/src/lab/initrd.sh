#!/bin/busybox sh
# First program of the lab's machine: puts the root together and goes there.
# Root: the host's own, read-only, under a layer in memory. /lab: what is shared with the host, writable.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module options; do insmod "/modules/$module" $options; done < /modules/order
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro root /lower || exit 1
mount -t tmpfs -o size=75% layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work overlay /new || exit 1
mount --move /dev /new/dev
mount --move /proc /new/proc
mount --move /sys /new/sys
mkdir -p /new/dev/pts /new/dev/shm /new/dev/hugepages /new/lab
mount -t devpts -o ptmxmode=0666 devpts /new/dev/pts
mount -t tmpfs shm /new/dev/shm
mount -t hugetlbfs hugetlbfs /new/dev/hugepages
mount -t tmpfs run /new/run
mount -t debugfs debugfs /new/sys/kernel/debug
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=none share /new/lab || exit 1
mkdir /new/run/lab
cp /bin/busybox /stage2 /new/run/lab/
exec switch_root /new /run/lab/busybox sh /run/lab/stage2
