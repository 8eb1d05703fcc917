#!/bin/busybox sh
# First program of the tiny guest. Says INIT-REACHED, then what the kernel command line asks for:
#   cleave.stop=init   nothing more: for measuring boots
#   (a /script joined to the archive)  the virtio drivers, the script, poweroff
#   otherwise          the virtio drivers and a shell on the console
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
echo "INIT-REACHED up $(/bin/busybox cut -d' ' -f1 /proc/uptime) $(/bin/busybox uname -r)"
if /bin/busybox grep -q cleave.stop=init /proc/cmdline; then
    exec /bin/busybox sleep 100000
fi
/bin/busybox --install -s /bin
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
echo 1 >/proc/sys/kernel/printk
while read -r module; do insmod "/modules/$module"; done </modules/order
if [ -e /script ]; then
    sh /script
    echo "SCRIPT-ENDED $?"
    poweroff -f
fi
echo SHELL
exec setsid -c sh -c 'exec sh </dev/ttyS0 >/dev/ttyS0 2>&1'
