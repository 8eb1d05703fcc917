# Process 1 of the lab's machine: runs the job and ends the machine with its exit code on the share.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux
busybox=/run/lab/busybox
hostname lab 2>/dev/null || $busybox hostname lab
$busybox ifconfig lo 127.0.0.1 up
. /lab/settings
mkdir -p /lib/modules && ln -sfn "$LAB_MODULES" "/lib/modules/$(uname -r)"

# Whoever waits for the job sees by this that the machine is not frozen.
(while echo >/lab/alive; do $busybox sleep 5; done) &

if [ "$LAB_INTERACTIVE" = 1 ]; then
    # A controlling terminal, as a login would have it: job control and Ctrl-C work.
    $busybox setsid -c $busybox sh -c 'stty 115200 sane rows "$1" cols "$2"; cd /; exec /lab/job' \
        job "$LAB_ROWS" "$LAB_COLUMNS" </dev/ttyS1 >/dev/ttyS1 2>&1
else
    (cd / && exec /lab/job) </dev/null >/lab/stdout 2>/lab/stderr
fi
echo $? >/lab/code.new
mv /lab/code.new /lab/code
sync
# Any write to this port ends QEMU at once (isa-debug-exit).
printf 'x' | dd of=/dev/port bs=1 seek=244 conv=notrunc 2>/dev/null
$busybox poweroff -f
