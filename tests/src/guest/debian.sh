#!/bin/sh
# Makes a minimal Debian on a raw disk image: debian.sh DIRECTORY SOURCES CHECK UNIT
# Leaves disk.raw, vmlinuz and initrd (Debian's own) in DIRECTORY. Needs root.
set -eu
directory=$1 sources=$2 check=$3 unit=$4
root=$directory/root

mmdebstrap --quiet --variant=minbase \
    --include=systemd-sysv,udev,dbus,login,kmod,procps,pciutils,e2fsprogs,fio,linux-image-cloud-amd64 \
    --include=iproute2,iputils-ping,ethtool,isc-dhcp-client,openssh-server,curl,iperf3 \
    --include=qemu-guest-agent,sg3-utils,lsscsi,sdparm,eject,memtester \
    --aptopt='Acquire::Languages "none"' \
    --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    bookworm "$root" "$sources"

echo cleave-guest >"$root/etc/hostname"
echo '127.0.0.1 localhost cleave-guest' >"$root/etc/hosts"
echo '/dev/vda / ext4 noatime 0 0' >"$root/etc/fstab"
printf 'Debian GNU/Linux 12 on Cleave \\l: log in as root, without a password\n\n' >"$root/etc/issue"
chroot "$root" passwd --quiet --delete root
rm -f "$root"/etc/systemd/system/timers.target.wants/apt-daily*.timer "$root"/etc/machine-id
: >"$root/etc/machine-id"
install -m 755 "$check" "$root/usr/local/sbin/cleave-check"
install -m 644 "$unit" "$root/etc/systemd/system/cleave-check.service"
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
# Anybody may log in at the console, nobody over the network: whoever wants that starts ssh, with a key.
chroot "$root" systemctl --quiet disable ssh.service
# The address that the kernel command line has for the network device: cleave.net=ADDRESS/BITS[,GATEWAY], or dhcp
cat >"$root/usr/local/sbin/cleave-network" <<'END'
#!/bin/sh
value=$(tr ' ' '\n' </proc/cmdline | sed -n 's/^cleave\.net=//p')
address=${value%%,*} gateway=${value#*,}
for device in /sys/bus/virtio/drivers/virtio_net/virtio*/net/*; do
    if [ "$value" = dhcp ]; then
        exec dhclient -1 "${device##*/}"
    fi
    ip link set "${device##*/}" up && ip address add "$address" dev "${device##*/}"
    [ "$gateway" = "$value" ] || ip route add default via "$gateway"
    break
done
END
chmod 755 "$root/usr/local/sbin/cleave-network"
cat >"$root/etc/systemd/system/cleave-network.service" <<'END'
[Unit]
Description=Network address from the kernel command line
ConditionKernelCommandLine=|cleave.net
After=systemd-udev-settle.service
Wants=systemd-udev-settle.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/cleave-network

[Install]
WantedBy=multi-user.target
END
ln -s ../cleave-network.service "$root/etc/systemd/system/multi-user.target.wants/cleave-network.service"
ln -s ../cleave-check.service "$root/etc/systemd/system/multi-user.target.wants/cleave-check.service"

cp "$root"/boot/vmlinuz-* "$directory/vmlinuz"
cp "$root"/boot/initrd.img-* "$directory/initrd"
chmod 644 "$directory/vmlinuz" "$directory/initrd"
# The name of the file system keeps a person from taking it for something else.
/sbin/mke2fs -q -t ext4 -L cleave-debian -d "$root" "$directory/disk.raw" 2G
rm -rf "$root"
