#!/bin/sh
# The guest's view of its machine, one line a device; runs when the kernel command line says cleave.check,
# then powers off. The command line says what to expect:
#   cleave.check=1|reboot   reboot: once, before the check
#   cleave.cpus=N           vCPUs
#   cleave.memory=N         MiB given to the guest; the kernel keeps some of them
#   cleave.net=A/N,GATEWAY  the network device's address, and who answers there
failures=0
say() { echo "cleave-check: $*"; }
verdict() { # STATUS WORDS...
    if [ "$1" -eq 0 ]; then
        shift
        say "$*: ok"
    else
        shift
        say "$*: FAILED"
        failures=$((failures + 1))
    fi
}
expected() { # KEY DEFAULT
    value=$(tr ' ' '\n' </proc/cmdline | sed -n "s/^cleave\.$1=//p")
    echo "${value:-$2}"
}

# Writes a file, drops the cache so that it comes from the disk again, and compares.
check_written() { # DIRECTORY MIB
    file=$1/cleave-check.data
    head -c "$2M" /dev/urandom >/dev/shm/data && cp /dev/shm/data "$file" && sync "$file" || return 1
    echo 3 >/proc/sys/vm/drop_caches
    cmp -s /dev/shm/data "$file"
    same=$?
    rm -f "$file" /dev/shm/data
    return $same
}

check_block() { # NAME
    bytes=$(($(cat "/sys/block/$1/size") * 512))
    size=$(numfmt --to=iec "$bytes")
    queues=$(ls "/sys/block/$1/mq" | wc -l)
    if [ "/dev/$1" = "$(findmnt -no SOURCE /)" ]; then
        check_written /var/tmp 16
        verdict $? "block $1: $size, queues: $queues, wrote and read back 16M"
    else
        [ "$(cat "/sys/block/$1/ro")" = 1 ] && how="read-only, " || how=
        dd if="/dev/$1" of=/dev/null bs=1M count=16 iflag=direct 2>/dev/null
        verdict $? "block $1: $size, queues: $queues, ${how}read"
    fi
}

check_net() { # NAME
    ip link set "$1" up
    mtu=$(cat "/sys/class/net/$1/mtu")
    queues=$(ls -d "/sys/class/net/$1/queues"/rx-* | wc -l)
    on=$(ethtool -k "$1" | sed -n 's/^\(tx-checksumming\|tcp-segmentation-offload\|rx-checksumming\): on.*/\1/p' | wc -l)
    offloads=$([ "$on" = 3 ] && echo "offloads on" || echo "offloads: $on of 3 on")
    gateway=$(expected net '')
    case $gateway in
    *,*)
        ping -q -c 3 -i 0.2 -W 5 "${gateway#*,}" >/dev/null
        verdict $? "net $1: MTU $mtu, queues: $queues, $offloads, ${gateway#*,} answers"
        ;;
    *)
        [ "$(cat "/sys/class/net/$1/carrier")" = 1 ]
        verdict $? "net $1: MTU $mtu, queues: $queues, $offloads, link up"
        ;;
    esac
}

# All ports of a device: consoles are written to, and the agent of the one that is its channel runs.
check_console() { # DIRECTORY
    names=
    failed=0
    for port in "$1"/virtio-ports/*; do
        name=$(cat "$port/name" 2>/dev/null)
        if [ -z "$name" ]; then
            name=hvc0
            [ -c /dev/hvc0 ] && echo "cleave-check: these words" >/dev/hvc0 || failed=1
        elif [ "$name" = org.qemu.guest_agent.0 ]; then
            systemctl start qemu-guest-agent && systemctl -q is-active qemu-guest-agent || failed=1
        fi
        names="$names${names:+, }$name"
    done
    [ -n "$names" ] || failed=1
    verdict $failed "console ${1##*/}: $names"
}

# A disk without a file system on it is written to; a medium in a CD-ROM drive has one.
check_scsi() { # DIRECTORY
    for block in $(ls -d "$1"/host*/target*/*/block/* 2>/dev/null | sort); do
        name=${block##*/}
        model=$(cat "$block/device/model" | xargs)
        case $name in
        sr*)
            mkdir -p /run/cdrom && mount -o ro "/dev/$name" /run/cdrom 2>/dev/null && [ -n "$(ls /run/cdrom)" ]
            verdict $? "scsi $name: $model, $(ls /run/cdrom | xargs)"
            umount /run/cdrom 2>/dev/null
            ;;
        *)
            head -c 4M /dev/urandom >/dev/shm/data
            [ -z "$(blkid "/dev/$name")" ] && dd if=/dev/shm/data of="/dev/$name" bs=1M oflag=direct 2>/dev/null &&
                dd if="/dev/$name" bs=1M count=4 iflag=direct 2>/dev/null | cmp -s - /dev/shm/data
            verdict $? "scsi $name: $model, $(numfmt --to=iec "$(($(cat "$block/size") * 512))"), wrote and read back 4M"
            ;;
        esac
    done
}

check_virtio() { # DIRECTORY
    name=${1##*/}
    if [ ! -e "$1/driver" ]; then
        verdict 1 "virtio $name: device type $(cat "$1/device") without a driver"
        return
    fi
    driver=$(basename "$(readlink "$1/driver")")
    block=$(ls "$1/block" 2>/dev/null)
    if [ -n "$block" ]; then
        check_block "$block"
    elif [ "$driver" = virtio_net ]; then
        check_net "$(ls "$1/net")"
    elif [ "$driver" = virtio_scsi ]; then
        check_scsi "$1"
    elif [ "$driver" = virtio_console ]; then
        check_console "$1"
    elif [ "$driver" = virtio_rng ]; then
        [ "$(head -c 64 /dev/hwrng | wc -c)" = 64 ]
        verdict $? "rng $name: 64 bytes from /dev/hwrng"
    elif [ "$driver" = virtio_balloon ]; then
        # Bit 5 of its features: what is free goes back to the host by itself.
        [ "$(cut -c6 "$1/features")" = 1 ]
        verdict $? "balloon $name: reports what is free"
    else
        verdict 0 "$driver $name: driver bound"
    fi
}

if [ "$(expected check 1)" = reboot ]; then
    mark=/var/lib/cleave-check-rebooted
    if [ ! -e "$mark" ]; then
        touch "$mark" && sync
        say "rebooting"
        exec systemctl --no-block reboot
    fi
    rm -f "$mark"
    say "came back from the reboot"
fi

. /etc/os-release
say "system: $PRETTY_NAME, Linux $(uname -r), systemd $(systemctl --version | sed -n '1s/systemd \([0-9]*\).*/\1/p')"
cpus=$(nproc)
[ "$cpus" = "$(expected cpus "$cpus")" ]
verdict $? "vCPUs: $cpus of $(expected cpus "$cpus")"
memory=$(($(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo) / 1024))
given=$(expected memory "$memory")
[ "$memory" -le "$given" ] && [ $((memory * 10)) -ge $((given * 8)) ]
verdict $? "memory: $memory MiB usable of $given MiB"
for device in /sys/bus/virtio/devices/*; do
    [ -e "$device" ] && check_virtio "$device"
done
verdict 0 "uart $(cat /sys/class/tty/console/active): these words"
[ "$failures" = 0 ] && say "passed" || say "failed: $failures"
exec systemctl --no-block poweroff
