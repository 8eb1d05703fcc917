//! Guests on a network without any privilege: passt between a Debian and a world of the test's own.
//!
//! ```text
//!   guest <──> cleave, its daemons, passt: nobody's, in the namespace "home" <──veth──> "world": HTTP, DNS
//! ```

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, sync::mpsc};

use cleave_tests::cache::Cache;
use cleave_tests::passt;
use cleave_tests::tools::Tools;
use cleave_tests::vm::{Outcome, Vm};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::rig::{Rig, SOON, nothing_left_behind, processes, says};

pub const CASES: &[crate::Case] = &[
    ("user::a_guest_without_privilege_goes_out_and_is_reached", ours_between),
    ("user::passt_serves_the_device_itself", direct),
];

const BOOT: Duration = Duration::from_secs(300);
const TRANSFER: Duration = Duration::from_secs(200);
/// What the world serves, in bytes.
const SIZE: usize = 16 << 20;

fn run(words: &str) -> Outcome<()> {
    let output = Command::new("sh").args(["-c", words]).output().map_err(|error| format!("sh: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{words}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

fn content() -> Vec<u8> {
    (0..SIZE / 8).flat_map(|n| (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

/// The namespaces, and who answers in the world.
struct World {
    dns: Option<Child>,
}

impl World {
    fn make() -> Outcome<Self> {
        let _ = run("modprobe -a veth");
        let mut world = Self { dns: None };
        world.remove();
        run("set -e; ip netns add home; ip netns add world
            ip link add out netns home type veth peer name in netns world
            ip -n home address add 192.0.2.2/24 dev out; ip -n world address add 192.0.2.1/24 dev in
            ip -n home link set lo up; ip -n home link set out up; ip -n world link set lo up; ip -n world link set in up
            ip -n home route add default via 192.0.2.1")?;
        let cache = Cache::open().map_err(|error| error.to_string())?;
        let tools = Tools::open(&cache).map_err(|error| error.to_string())?;
        let mut dns = Command::new("ip");
        dns.args(["netns", "exec", "world"]).arg(tools.bin().join("dnsmasq"));
        dns.args([
            "--keep-in-foreground",
            "--no-resolv",
            "--no-hosts",
            "--conf-file=/dev/null",
            "--pid-file=",
            "--user=root",
        ]);
        dns.args(["--listen-address=192.0.2.1", "--bind-interfaces", "--address=/world.test/192.0.2.1"]);
        world.dns = Some(dns.stdin(Stdio::null()).spawn().map_err(|error| format!("dnsmasq: {error}"))?);
        serve()?;
        Ok(world)
    }

    fn remove(&mut self) {
        if let Some(dns) = &mut self.dns {
            let _ = dns.kill();
            let _ = dns.wait();
        }
        let _ = run("ip netns del home; ip netns del world");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Listens for HTTP in the world, from a thread of its own, and gives everybody the content.
fn serve() -> Outcome<()> {
    let (ready, listens) = mpsc::channel();
    thread::spawn(move || {
        let listen = || -> io::Result<TcpListener> {
            let world = fs::File::open("/run/netns/world")?;
            move_into_link_name_space(world.as_fd(), Some(LinkNameSpaceType::Network))?;
            TcpListener::bind("192.0.2.1:80")
        };
        let listener = match listen() {
            Ok(listener) => listener,
            Err(error) => return drop(ready.send(Err(format!("listen in the world: {error}")))),
        };
        let _ = ready.send(Ok(()));
        let content = content();
        for mut stream in listener.incoming().flatten() {
            let content = content.clone();
            // Who goes away in the middle was meant to.
            thread::spawn(move || answer(&mut stream, &content).is_ok());
        }
    });
    listens.recv().unwrap_or_else(|_| Err("nobody listens in the world".to_owned()))
}

fn answer(stream: &mut (impl Read + Write), content: &[u8]) -> io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        request.push(byte[0]);
    }
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", content.len())?;
    stream.write_all(content)
}

/// Copies what nobody may not read where it is, for whoever `cleave` is there.
fn copy(rig: &Rig, from: &Path, name: &str) -> Outcome<PathBuf> {
    let to = rig.path(name);
    let mode = if name.contains('.') { 0o644 } else { 0o755 };
    fs::copy(from, &to)
        .and_then(|_| fs::set_permissions(&to, fs::Permissions::from_mode(mode)))
        .map_err(|error| format!("copy {}: {error}", from.display()))?;
    Ok(to)
}

/// A Debian with this network, of the user nobody, who has no capability and gets none. `path` comes first in PATH.
fn start(rig: &Rig, net: &str, path: &Path) -> Outcome<Vm> {
    let io = |error: io::Error| format!("prepare a place for nobody: {error}");
    fs::set_permissions(rig.path("."), fs::Permissions::from_mode(0o755)).map_err(io)?;
    for program in ["cleave", "cleave-net", "cleave-block"] {
        copy(rig, &rig.daemon(program), program)?;
    }
    let (kernel, initrd) =
        (copy(rig, &rig.debian.kernel, "vm.linuz")?, copy(rig, &rig.debian.initrd, "initrd.img")?);
    let disk = std::env::var_os("LAB_DISK0").map(PathBuf::from).ok_or("there is no disk in $LAB_DISK0")?;
    for device in [disk.as_path(), Path::new("/dev/kvm")] {
        let mode = fs::metadata(device).map_err(io)?.permissions().mode();
        fs::set_permissions(device, fs::Permissions::from_mode(mode | 0o666)).map_err(io)?;
    }
    let resolv = rig.write("resolv.conf", b"nameserver 192.0.2.1\n")?;
    let mut command = Command::new("ip");
    command.args(["netns", "exec", "home", "unshare", "--mount", "sh", "-c"]);
    command.arg(r#"mount --bind "$1" /etc/resolv.conf && shift && exec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs "$@""#);
    command.arg("sh").arg(resolv).arg(rig.path("cleave")).args(["run", "--kernel"]).arg(kernel);
    command.arg("--initrd").arg(initrd);
    command.args(["--append", "console=ttyS0 root=/dev/vda quiet cleave.net=dhcp"]);
    command.args(["--cpus", "2", "--memory", "512M", "--disk", &disk.display().to_string(), "--net", net]);
    let others = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{others}", path.display()));
    let mut vm = Vm::start(&mut command)?;
    vm.expect("cleave-guest login:", BOOT)?;
    vm.send("root")?;
    vm.expect("root@cleave-guest:~#", BOOT)?;
    Ok(vm)
}

/// The guest fetches what the world has, by name.
fn fetches(vm: &mut Vm, mark: u32) -> Outcome<()> {
    // A network that is coming back may take a moment.
    vm.send(&format!(
        "for n in 1 2 3 4 5 6; do curl -sS --connect-timeout 20 -o /dev/shm/content http://world.test/content && break; \
         sleep 1; done; echo GOT-$(({mark} + 1)) $(stat -c %s /dev/shm/content) $(md5sum </dev/shm/content); rm /dev/shm/content"
    ))?;
    let said = vm.expect(&format!("GOT-{} ", mark + 1), TRANSFER).and_then(|_| vm.expect("\r\n", SOON))?;
    let sum =
        Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().and_then(|mut child| {
            child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?.write_all(&content())?;
            child.wait_with_output()
        });
    let sum = sum.map_err(|error| format!("md5sum: {error}"))?;
    let sum = String::from_utf8_lossy(&sum.stdout);
    says(&said, &format!("{SIZE} {}", sum.split(' ').next().unwrap_or_default()))
}

fn has_an_address(vm: &mut Vm) -> Outcome<()> {
    vm.send("ip -o address; cat /proc/net/route | wc -l; cat /etc/resolv.conf; echo LOOKED-$((8 * 8)).")?;
    let said = vm.expect("LOOKED-64.", SOON)?;
    ["inet 192.0.2.2/24", "nameserver 192.0.2.1"].iter().try_for_each(|words| says(&said, words))
}

/// Starts sshd with a key that the guest makes, and runs a command over the forwarded port.
fn ssh(rig: &Rig, vm: &mut Vm) -> Outcome<()> {
    vm.send("ssh-keygen -q -t ed25519 -N '' -f k && mkdir -p .ssh && cp k.pub .ssh/authorized_keys && systemctl start ssh; cat k; echo SSH-$((5 * 5)).")?;
    let said = vm.expect("SSH-25.", SOON)?.replace('\r', "");
    let key = said.find("-----BEGIN").and_then(|start| {
        let end = said.rfind("-----END")? + "-----END OPENSSH PRIVATE KEY-----".len();
        said.get(start..end)
    });
    let key = rig.write("key", format!("{}\n", key.ok_or("the guest shows no key")?).as_bytes())?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).map_err(|error| error.to_string())?;
    let cache = Cache::open().map_err(|error| error.to_string())?;
    let tools = Tools::open(&cache).map_err(|error| error.to_string())?;
    let mut command = Command::new("ip");
    command.args(["netns", "exec", "home"]).arg(tools.bin().join("ssh"));
    command.args(["-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
    command.args(["-o", "BatchMode=yes", "-o", "ConnectTimeout=60", "-i"]).arg(key);
    let output = command.args(["-p", "2222", "root@127.0.0.1", "hostname; echo $((6 * 7))"]).output();
    let output = output.map_err(|error| format!("ssh: {error}"))?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    says(&said, "cleave-guest\n42\n")
}

fn ours_between(rig: &Rig) -> Outcome<()> {
    let _world = World::make()?;
    let mut vm = start(rig, "user,hostfwd=tcp:2222:22", Path::new("/usr/bin"))?;
    has_an_address(&mut vm)?;
    let begun = Instant::now();
    fetches(&mut vm, 10)?;
    eprintln!("16 MiB by HTTP in {:?}", begun.elapsed());
    ssh(rig, &mut vm)?;
    let status =
        fs::read_to_string(format!("/proc/{}/status", vm.pid())).map_err(|error| error.to_string())?;
    ["Uid:\t65534\t65534", "CapPrm:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"]
        .iter()
        .try_for_each(|words| says(&status, words))?;
    vm.send("systemctl poweroff")?;
    vm.finish(BOOT)?;
    nothing_left_behind()
}

fn direct(rig: &Rig) -> Outcome<()> {
    let _world = World::make()?;
    let cache = Cache::open().map_err(|error| error.to_string())?;
    let from = passt::newer(&cache).map_err(|error| error.to_string())?;
    for (name, copied) in [("passt", "passt"), ("program", "program")] {
        copy(rig, &from.join(name), copied)?;
    }
    // The loader has to be executable.
    for name in ["ld-linux-x86-64.so.2", "libc.so.6"] {
        let to = copy(rig, &from.join(name), name)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).map_err(|error| error.to_string())?;
    }
    let mut vm = start(rig, "user,direct=on,hostfwd=tcp:2222:22", &rig.path("."))?;
    if !processes("cleave-net", None).is_empty() {
        return Err("there is a daemon of ours between".to_owned());
    }
    has_an_address(&mut vm)?;
    fetches(&mut vm, 10)?;
    ssh(rig, &mut vm)?;
    vm.send("systemctl poweroff")?;
    vm.finish(BOOT)?;
    nothing_left_behind()
}
