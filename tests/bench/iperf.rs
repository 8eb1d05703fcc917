//! iperf3 between a Debian guest and its host over a tap device on a bridge: cleave with cleave-net beside QEMU with its own
//! virtio-net, in turns, in one lab machine.
//!
//! Guests have one vCPU, as the lab's machine bears them best, and one pair of queues.
//!
//! QEMU has its backend in its own process (`vhost=off`), and where the host has /dev/vhost-net in the kernel, too
//! (`vhost=on`). Both machines have the same memory and disk.

use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use clap::Parser;
use cleave_common::size::ByteSize;
use cleave_tests::cache::Cache;
use cleave_tests::error::{Context, Error, Result};
use cleave_tests::guest::Debian;
use cleave_tests::lab::{Disk, Job, Lab, binaries};
use cleave_tests::tools::Tools;
use cleave_tests::vm::Vm;

const HOST: &str = "10.79.0.1";
const GUEST: &str = "10.79.0.2";
const BOOT: Duration = Duration::from_secs(240);

#[derive(Parser)]
#[command(
    name = "iperf-bench",
    about = "Measures iperf3 between a guest and its host: cleave-net beside QEMU's virtio-net in the same run"
)]
struct Cli {
    /// Boots of each VMM
    #[arg(long, default_value_t = 2, value_name = "N")]
    rounds: usize,
    /// Seconds of each transfer
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
    time: u32,
    /// Streams at once
    #[arg(long, default_value_t = 2, value_name = "N")]
    parallel: u32,
    /// The copy of this program that runs in the lab
    #[arg(long, hide = true)]
    inside: bool,
}

fn main() -> ExitCode {
    let cli = match cleave_common::cli::read::<Cli>() {
        Ok(cli) => cli,
        Err(code) => return code.into(),
    };
    let result = if cli.inside { inside(&cli) } else { outside(&cli) };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("iperf-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn outside(cli: &Cli) -> Result<()> {
    let bin = binaries().ok_or_else(|| {
        Error::Refused("cleave is not built: cargo build --release --workspace comes first".to_owned())
    })?;
    let cache = Cache::open()?;
    let debian = Debian::open(&cache)?;
    let lab = Lab::open(&cache)?;
    println!("running on {:?}: {}", lab.place(), lab.why());
    let this = std::env::current_exe().context(|| "find this program")?;
    let mut job = Job::new([this.as_os_str()]);
    job.command.extend(["--inside".into(), "--rounds".into(), cli.rounds.to_string().into()]);
    job.command.extend(["--time".into(), cli.time.to_string().into()]);
    job.command.extend(["--parallel".into(), cli.parallel.to_string().into()]);
    job.environment =
        vec![("CLEAVE_BIN_DIR".to_owned(), bin.into()), ("CLEAVE_LAB_DIR".to_owned(), cache.root().into())];
    job.cpus = 2;
    job.memory = ByteSize(4 << 30);
    job.disks = vec![Disk { path: debian.disk.clone(), persistent: false }];
    job.time_limit = Duration::from_secs(3000);
    job.follow = true;
    let outcome = lab.run(&job, lab.directory()?)?;
    if outcome.code != 0 {
        let kept = outcome.directory.path().display();
        return Err(Error::Refused(format!("the measurement failed; the run is kept in {kept}")));
    }
    Ok(())
}

/// What a machine is made of.
struct Parts {
    bin: PathBuf,
    debian: Debian,
    disk: PathBuf,
}

impl Parts {
    fn append(&self) -> String {
        format!("console=ttyS0 root=/dev/vda quiet cleave.net={GUEST}/24")
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Contender {
    Cleave,
    Qemu { vhost: bool },
}

impl Contender {
    fn name(self) -> &'static str {
        match self {
            Self::Cleave => "cleave",
            Self::Qemu { vhost: false } => "qemu",
            Self::Qemu { vhost: true } => "qemu-vhost",
        }
    }

    fn command(self, parts: &Parts) -> Command {
        match self {
            Self::Cleave => cleave(parts),
            Self::Qemu { vhost } => qemu(parts, vhost),
        }
    }
}

fn cleave(parts: &Parts) -> Command {
    let mut command = Command::new(parts.bin.join("cleave"));
    command.args(["run", "--memory", "512M", "--append", &parts.append(), "--kernel"]);
    command.arg(&parts.debian.kernel).arg("--initrd").arg(&parts.debian.initrd);
    command.args(["--disk", &parts.disk.display().to_string(), "--net", "tap=tap0,bridge=br0"]);
    command
}

fn qemu(parts: &Parts, vhost: bool) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "q35", "-accel", "kvm", "-cpu", "host", "-m", "512M"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    command.args(["-append", &parts.append(), "-kernel"]).arg(&parts.debian.kernel);
    command.arg("-initrd").arg(&parts.debian.initrd);
    command.args(["-device", "virtio-blk-pci,drive=d", "-drive"]);
    command.arg(format!("if=none,id=d,format=raw,file={}", parts.disk.display()));
    let vhost = if vhost { "on" } else { "off" };
    command.arg("-netdev");
    command.arg(format!("tap,id=n,ifname=tap0,script=no,downscript=no,vhost={vhost}"));
    command.args(["-device", "virtio-net-pci,netdev=n,rx_queue_size=1024"]);
    command
}

/// The host's end, for as long as this is there.
struct Host(Child);

impl Host {
    fn set_up() -> Result<Self> {
        let _ = ip("link del br0");
        let _ = ip("link del tap0");
        for words in [
            "link add br0 type bridge",
            &format!("address add {HOST}/24 dev br0"),
            "link set br0 up",
            // QEMU opens one that is there; cleave-net does so as well.
            "tuntap add dev tap0 mode tap vnet_hdr",
            "link set tap0 master br0 up",
        ] {
            ip(words)?;
        }
        let tools = Tools::open(&Cache::open()?)?;
        let mut server = tools.command("iperf3");
        server.args(["--server", "--bind", HOST]).stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Self(server.spawn().context(|| "start iperf3")?))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = ip("link del tap0");
        let _ = ip("link del br0");
    }
}

fn ip(words: &str) -> Result<()> {
    let output = Command::new("ip").args(words.split_whitespace()).output().context(|| "start ip")?;
    match output.status.success() {
        true => Ok(()),
        false => Err(Error::Refused(format!("ip {words}: {}", String::from_utf8_lossy(&output.stderr)))),
    }
}

/// Bits a second of each direction.
#[derive(Clone, Copy)]
struct Sample {
    from_guest: f64,
    to_guest: f64,
}

fn measure(contender: Contender, parts: &Parts, cli: &Cli) -> Result<Sample> {
    let _host = Host::set_up()?;
    let mut vm = Vm::start(&mut contender.command(parts)).map_err(Error::Refused)?;
    vm.expect("cleave-guest login:", BOOT).map_err(Error::Refused)?;
    vm.send("root").map_err(Error::Refused)?;
    vm.expect("root@cleave-guest:~#", BOOT).map_err(Error::Refused)?;
    let mut transfer = |more: &str| -> Result<f64> {
        let Cli { time, parallel, .. } = cli;
        // The console is slow: only what is wanted of the answer is shown.
        let words = format!(
            "iperf3 --client {HOST} --time {time} --omit 1 --parallel {parallel} --json {more} | \
             grep -A 9 sum_received | grep bits_per_second; echo TAKEN-$((6 * 7))."
        );
        vm.send(&words).map_err(Error::Refused)?;
        let limit = Duration::from_secs(u64::from(cli.time) + 120);
        let said = vm.expect("TAKEN-42.", limit).map_err(Error::Refused)?;
        received(&said).ok_or_else(|| Error::Refused(format!("iperf3 did not end well:\n{said}")))
    };
    let from_guest = transfer("")?;
    let to_guest = transfer("--reverse")?;
    // The next one has the same disk.
    vm.send("systemctl poweroff").map_err(Error::Refused)?;
    vm.wait(BOOT).map_err(Error::Refused)?;
    Ok(Sample { from_guest, to_guest })
}

/// What iperf3's receiver says that it got, in bits a second.
fn received(said: &str) -> Option<f64> {
    let (_, value) = said.split_once("\"bits_per_second\":")?;
    value.split([',', '\r', '\n']).next()?.trim().parse().ok()
}

fn inside(cli: &Cli) -> Result<()> {
    for module in ["tun", "bridge", "vhost_net"] {
        // Where these are built in, there is nothing to load.
        let _ = Command::new("modprobe").arg(module).stderr(Stdio::null()).status();
    }
    let disk = std::env::var_os("LAB_DISK0").map(PathBuf::from);
    let parts = Parts {
        bin: binaries().unwrap_or_default(),
        debian: Debian::open(&Cache::open()?)?,
        disk: disk.ok_or_else(|| Error::Refused("there is no disk in $LAB_DISK0".to_owned()))?,
    };
    let mut contenders = vec![Contender::Qemu { vhost: false }, Contender::Cleave];
    if std::path::Path::new("/dev/vhost-net").exists() {
        contenders.push(Contender::Qemu { vhost: true });
    } else {
        println!("there is no /dev/vhost-net here: QEMU's virtio-net is measured without it");
    }
    let mut samples: Vec<Vec<Sample>> = contenders.iter().map(|_| Vec::new()).collect();
    for _ in 0..cli.rounds {
        for (contender, samples) in contenders.iter().zip(&mut samples) {
            samples.push(measure(*contender, &parts, cli)?);
        }
    }
    println!("{:12} {:>20} {:>20}", "Gbit/s", "guest to host", "host to guest");
    let medians: Vec<[f64; 2]> = samples
        .iter()
        .map(|samples| {
            [median(samples, |sample| sample.from_guest), median(samples, |sample| sample.to_guest)]
        })
        .collect();
    for (contender, figures) in contenders.iter().zip(&medians) {
        let shares = figures.iter().zip(&medians[0]).map(|(mine, first)| mine / first);
        let words: Vec<String> = figures
            .iter()
            .zip(shares)
            .map(|(bits, share)| format!("{:>11.3} ({share:>5.2})", bits / 1e9))
            .collect();
        println!("{:12} {:>20} {:>20}", contender.name(), words[0], words[1]);
    }
    Ok(())
}

fn median(samples: &[Sample], what: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(what).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrived_is_what_counts() {
        let said = "# iperf3 ... | grep bits_per_second; ...\r\n\t\t\t\"bits_per_second\":\t1500000000.5,\r\nTAKEN-42.";
        assert_eq!(received(said), Some(1_500_000_000.5));
        assert_eq!(received("iperf3: error - unable to connect to server\r\nTAKEN-42."), None);
    }
}
