//! The command line: words in, [`Settings`] out. What a word means is said by the type it becomes.

#[cfg(test)]
mod tests;

use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use cleave_common::exit::{ExitCode, Failure};
use cleave_common::options;

use crate::config::{
    self, BalloonConfig, Cdrom, ControlAddress, DeviceConfig, DiskConfig, MachineConfig, MemoryConfig,
    NetConfig, Port, ScsiController, ScsiDisk, Settings, UartConfig,
};

/// Bytes of a configuration file: more is no description of a machine.
const MOST_CONFIG: u64 = 1 << 20;

const EXIT_CODES: &str = "\
Exit codes:
  0  the guest shut down, or cleave was asked to stop
  1  internal error: a bug in cleave
  2  usage: the command line, the configuration or a file it names
  3  host: no KVM, no permission, not enough memory
  4  device: a daemon could not be started, reached or understood
  6  guest fault: triple fault or KVM internal error

Environment:
  CLEAVE_LOG  what is logged to standard error: error, warn (the default), info, debug, trace";

const RUN_EXAMPLES: &str = "\
Examples:
  A Debian machine with its disk in a daemon that cleave starts:
    cleave run --kernel vmlinuz --initrd initrd.img --append 'root=/dev/vda console=ttyS0' \\
        --memory 2G --cpus 2 --disk debian.raw
  The same on a network, its tap device made for it on the bridge br0 (as root):
    cleave run --kernel vmlinuz --initrd initrd.img --append 'root=/dev/vda console=ttyS0' \\
        --disk debian.raw --net tap=tap0,bridge=br0,mac=52:54:00:12:34:56
  Without any privilege, the guest's ssh at this host's port 2222 (by passt):
    cleave run --kernel vmlinuz --initrd initrd.img --append 'root=/dev/vda console=ttyS0' \\
        --disk debian.raw --net user,hostfwd=tcp:2222:22
  A disk and a random number generator served by daemons that someone else runs:
    cleave run --kernel vmlinuz --device type=block,socket=/run/disk.sock \\
        --device type=rng,socket=/run/rng.sock,wait=2min

With --uart stdio, Ctrl-A x quits and Ctrl-A h lists the keys. SIGTERM presses the guest's power button; a second
one, or SIGINT, stops the machine at once. SIGUSR1 prints how the devices are.";

const MEMORY_COLUMNS: &str = "\
A line for each machine's VMM, then one for each process that it started or that maps its memory:
  GUEST     guest memory, as the guest has it
  RESIDENT  what of it is in the host's RAM
  SWAPPED   what of it is swapped out on the host
  HOLES     what of it is nowhere: never touched, or given back by a balloon or by reporting
  MAPPED    guest memory in this process's page tables
  HUGE      what of that is in huge pages
  OWN       this process's share (PSS) of its other memory: what it costs besides
  OWN-SWAP  its other memory that is swapped out

The figures are the kernel's (/proc/PID/smaps, of which smaps_rollup is the sum). '?' stands for
those of processes that this user may not look at.";

/// A virtual machine monitor whose devices are processes of their own, over vhost-user
#[derive(Debug, Parser)]
#[command(version, after_long_help = EXIT_CODES, after_help = "'cleave help COMMAND' says more.")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a machine until its guest shuts down
    #[command(after_long_help = format!("{RUN_EXAMPLES}\n\n{EXIT_CODES}"))]
    Run(Box<RunArgs>),
    /// Attach this terminal to the console of a running machine
    Console {
        /// The unix socket of --console unix=PATH
        #[arg(value_name = "SOCKET")]
        socket: PathBuf,
    },
    /// Say what this host offers and lacks for running machines, and what to do about it
    Check {
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Say where the memory of running machines is: in RAM, swapped out, given back, and with which process
    #[command(after_long_help = MEMORY_COLUMNS)]
    Memory {
        /// A machine's `cleave run`; all that this user may look at unless given
        #[arg(value_name = "PID")]
        pids: Vec<u32>,
        /// Print JSON for programs, in bytes
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Read the machine from a TOML file; its keys are named like these options, flags override it, and disks and
    /// devices given here are added to the file's
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// The kernel: a bzImage (started by the 64-bit boot protocol) or an ELF vmlinux (started by PVH)
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// The initial ramdisk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// The kernel command line [default: console=ttyS0]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    append: Option<String>,

    /// Number of vCPUs, 1 to 64 [default: 1]
    #[arg(long, value_name = "N", value_parser = vcpus, allow_negative_numbers = true)]
    cpus: Option<u32>,

    /// Guest memory: SIZE, or
    /// size=SIZE[,backing=memfd|hugetlbfs][,page-size=2M|1G][,mem-path=DIR][,thp=always|never|advise]
    /// [,prefault=on][,prefault-threads=N][,host-node=LIST][,dump=off] [default: 512M]
    ///
    /// backing=hugetlbfs takes the host's reserved huge pages. mem-path=/dev/hugepages does so from a mounted hugetlbfs,
    /// within its limits and permissions; only there a daemon could end the machine, by cutting its memory short. thp= is
    /// about the transparent huge pages of a memfd: always has to have them, never has none, advise takes what the host
    /// gives. prefault=on takes all memory from the host before the guest starts, with a thread for each host CPU, up to 8,
    /// unless prefault-threads= says how many. host-node=0 takes memory of those NUMA nodes of the host only; huge pages are
    /// then all taken at the start. dump=off leaves guest memory out of core dumps.
    #[arg(long, value_name = "SIZE|KEYS", value_parser = |text: &str| options::parse::<MemoryConfig>(text, Some("size")))]
    memory: Option<MemoryConfig>,

    /// Add a disk, served by a cleave-block that is started for it:
    /// PATH[,format=raw|qcow2][,readonly=on][,queues=N][,cache=none|writeback|writethrough][,serial=TEXT][,id=NAME]
    /// [,restart=always|on-failure|never][,restart-limit=N][,io-timeout=30s]
    /// [,on-full=error|pause][,poll-us=N][,cpus=LIST][,throttle.KEY=N...]
    ///
    /// PATH is an image file or a block device. queues= is the number of vCPUs, at most 4, unless given. cache=none
    /// bypasses the host's page cache; the default is writeback. A daemon that ends is started again, and what the guest
    /// had asked of it is done: always unless restart= says otherwise (on-failure: not after exit code 0), and without
    /// end unless restart-limit= says how often. A daemon that answers but completes no request of a queue for io-timeout=
    /// is ended and started again, too; there is no such time unless given, for only you know how slow the disk may be.
    /// on-full=pause keeps writes that find no room on the host until there is
    /// some. poll-us= lets the daemon look for work so long before it sleeps. cpus=0-1 are host CPUs for its queues.
    /// throttle.iops-total=, throttle.bps-write= and so on limit rates: 'cleave-block --help' lists the keys. A comma in a
    /// value is written twice.
    #[arg(long, value_name = "PATH|KEYS", value_parser = |text: &str| options::parse::<DiskConfig>(text, Some("path")))]
    disk: Vec<DiskConfig>,

    /// Add a network device, on a tap device by a cleave-net that is started for it:
    /// tap=NAME[,bridge=NAME][,mac=ADDRESS][,mtu=BYTES][,queues=N][,poll-us=N][,cpus=LIST][,id=NAME]
    /// [,throttle.KEY=N...][,pcap=PATH[,pcap-snaplen=BYTES]][,restart=always|on-failure|never][,restart-limit=N];
    /// without privilege, by passt: user[,hostfwd=tcp|udp:[ADDRESS:]PORT:PORT]...[,host=on][,direct=on] and mac=, mtu=,
    /// poll-us=, cpus=, throttle., pcap=, id=, restart= as above;
    /// or by a daemon that someone else runs: socket=PATH[,wait=30s][,queues=N][,id=NAME]; or none [default: none]
    ///
    /// user takes the program passt (Debian's package) and nothing else: the guest gets an address by DHCP and goes where
    /// this user's programs go. hostfwd=tcp:2222:22, which may be given many times, has this host's port 2222 lead to the
    /// guest's 22; it is listened on at 127.0.0.1 unless it names an address. host=on lets the guest reach this host's own
    /// services at its gateway's address. direct=on, which is not finished, leaves out cleave-net where passt can do without (--vhost-user).
    ///
    /// The tap device is opened if there is one of that name, else made (that takes CAP_NET_ADMIN) and removed in the end.
    /// bridge= makes it a port of that bridge. mac= is the guest's address; one that follows from this host and the tap's
    /// name unless given. queues= is the number of pairs of queues, 1 unless given. throttle.bps-rx=, throttle.pps-tx= and so on
    /// limit what the guest receives and sends, and pcap= has all frames written to a file or a pipe: 'cleave-net --help' says
    /// more. A daemon that ends is started again,
    /// as with --disk. none leaves out those that the configuration file asks for.
    #[arg(long, value_name = "KEYS|none", value_parser = |text: &str| options::parse::<NetConfig>(text, Some("kind")))]
    net: Vec<NetConfig>,

    /// Add a SCSI disk, served by a cleave-scsi that is started for all of them and all CD-ROM drives:
    /// disk=PATH[,lun=N][,target=N][,format=raw|qcow2][,readonly=on][,cache=none|writeback|writethrough][,serial=TEXT]
    /// [,product=TEXT][,wwn=NUMBER][,on-full=error|pause][,throttle.KEY=N...]
    ///
    /// lun= is the first that is free unless given, target= is 0.
    #[arg(long, value_name = "KEYS", value_parser = |text: &str| options::parse::<ScsiDisk>(text, None))]
    scsi: Vec<ScsiDisk>,

    /// Add a CD-ROM drive to the SCSI adapter: PATH|none[,lun=N][,target=N][,serial=TEXT][,wwn=NUMBER]
    ///
    /// PATH is an ISO image; with none the drive is empty. 'cleave-scsi ctl' changes it while the guest runs.
    #[arg(long, value_name = "PATH|KEYS", value_parser = cdrom)]
    cdrom: Vec<Cdrom>,

    /// How the SCSI adapter is served: queues=N, control=PATH, state=PATH, poll-us=N, cpus=LIST,
    /// restart=always|on-failure|never, restart-limit=N, id=NAME
    ///
    /// queues= is the number of vCPUs, at most 4, unless given. control= is a socket for 'cleave-scsi ctl', which changes
    /// media, and adds and removes units. state= is a file that keeps reservations, and what was changed, when the daemon
    /// is started again.
    #[arg(long, value_name = "KEYS", value_parser = |text: &str| options::parse::<ScsiController>(text, None))]
    scsi_controller: Option<ScsiController>,
    /// Add a memory balloon, served by a cleave-balloon that is started for it:
    /// [on|off][,target=SIZE][,min=SIZE][,auto=on,free=SIZE][,stats=TIME][,reporting=off][,control=PATH]
    /// [,id=NAME][,restart=always|on-failure|never][,restart-limit=N] [default: off]
    ///
    /// What the guest reports free goes back to the host by itself, unless reporting=off. target= is what the guest has at first, all of its
    /// memory unless given; 'cleave-balloon ctl PATH target size=SIZE' changes it, where PATH is that of control=. min= is
    /// what the guest is left in any case, 128M unless given. auto=on keeps its available memory near free=. stats= is how
    /// often the guest is asked for statistics.
    #[arg(long, value_name = "KEYS|on|off", num_args = 0..=1, default_missing_value = "on", require_equals = false,
        value_parser = |text: &str| options::parse::<BalloonConfig>(text, Some("kind")))]
    balloon: Option<BalloonConfig>,

    /// Attach a vhost-user daemon that someone else runs:
    /// type=NAME|NUMBER,socket=PATH[,wait=30s][,queues=N][,id=NAME]
    ///
    /// type= is the virtio device's name (block, net, rng, fs, vsock, ...) or number. wait= is how long the daemon may
    /// take to come up. queues= is for daemons that cannot say how many virtqueues they have; 1 unless given.
    #[arg(long, value_name = "KEYS", value_parser = |text: &str| options::parse::<DeviceConfig>(text, None))]
    device: Vec<DeviceConfig>,

    /// Where the serial port ttyS0 goes: stdio, pty, file=PATH, unix=PATH or off [default: stdio]
    #[arg(long, value_name = "WHERE")]
    uart: Option<UartConfig>,

    /// What the machine is called, to whoever controls it
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Take commands in QMP, QEMU's monitor protocol, on this socket: unix:PATH or tcp:127.0.0.1:PORT; again for more
    ///
    /// QEMU's own words (server=on, wait=off) may follow. Whoever may connect may steer the machine: a TCP address that
    /// other hosts can reach is refused unless exposed=on follows.
    #[arg(long, value_name = "ADDRESS")]
    qmp: Vec<ControlAddress>,
    /// Add a console, the guest's hvc0, served by a cleave-serial that is started for it:
    /// stdio, pty[,link=PATH], unix=PATH, tcp=ADDRESS:PORT, file=PATH, pipe=PATH or log=SIZE
    /// [,history=SIZE][,on-full=wait|drop][,name=NAME]
    ///
    /// stdio is this terminal, with its size; then there is no serial port unless --uart says so, and the kernel command line
    /// is console=hvc0 unless --append is given. 'cleave console' attaches to a unix socket. history= is what is shown to who
    /// attaches, of what was printed before. What nobody reads in time is missing, and said so; on-full=wait has the guest
    /// wait instead, which stops a CPU of a Linux guest.
    #[arg(long, value_name = "KEYS", value_parser = config::parse_port)]
    console: Vec<Port>,

    /// Add a serial port, /dev/virtio-ports/NAME in the guest: name=NAME, and where as with --console but stdio; or
    /// unix=PATH,connect
    ///
    /// It has one client at a time, which gets each byte once, and the guest's writer waits for it. The guest's QEMU agent
    /// listens at name=org.qemu.guest_agent.0.
    #[arg(long, value_name = "KEYS", value_parser = config::parse_port)]
    serial: Vec<Port>,

    /// Let each thread make only the system calls it has a use for [default: on]
    #[arg(long, value_name = "on|off", value_parser = on_or_off)]
    sandbox: Option<bool>,
}

fn cdrom(text: &str) -> Result<Cdrom, String> {
    let mut cdrom: Cdrom = options::parse(text, Some("path")).map_err(|error| error.to_string())?;
    cdrom.path = cdrom.path.filter(|path| path.as_os_str() != "none");
    Ok(cdrom)
}

fn vcpus(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("a machine has 1 to {} vCPUs", config::MAX_VCPUS))
}

fn on_or_off(text: &str) -> Result<bool, String> {
    options::switch(text).ok_or_else(|| "it is on or off".to_owned())
}

impl Cli {
    /// The command line, or what to end with.
    pub fn read() -> Result<Self, ExitCode> {
        cleave_common::cli::read()
    }
}

impl RunArgs {
    /// The machine these flags and the configuration file they name ask for.
    pub fn into_config(self) -> Result<MachineConfig, Failure> {
        let base = match &self.config {
            Some(path) => read_settings(path)?,
            None => Settings::default(),
        };
        let flags = Settings {
            kernel: self.kernel,
            initrd: self.initrd,
            append: self.append,
            cpus: self.cpus,
            memory: self.memory,
            uart: self.uart,
            console: self.console,
            serial: self.serial,
            sandbox: self.sandbox,
            name: self.name,
            qmp: self.qmp,
            disk: self.disk,
            net: self.net,
            scsi: self.scsi,
            cdrom: self.cdrom,
            scsi_controller: self.scsi_controller,
            balloon: self.balloon,
            device: self.device,
        };
        base.overridden_by(flags).validate().map_err(Failure::usage)
    }
}

fn read_settings(path: &Path) -> Result<Settings, Failure> {
    let complain = |error: &dyn Display| Failure::usage(format!("--config {}: {error}", path.display()));
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MOST_CONFIG + 1).read_to_end(&mut bytes));
    if read.map_err(|error| complain(&error))? as u64 > MOST_CONFIG {
        return Err(complain(&"it is larger than 1 MiB: that is no description of a machine"));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        complain(&format_args!("it is no text file: the bytes from {at} on are not UTF-8"))
    })?;
    config::parse_file(&text).map_err(|error| complain(&error))
}
