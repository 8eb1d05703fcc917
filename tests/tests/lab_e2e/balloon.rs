//! A balloon in a real guest: what the host gets back, how fast, and that the guest's own memory is never touched.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use cleave_common::control::Client;
use cleave_tests::vm::{Outcome, Vm};
use serde_json::{Map, Value, json};

use crate::rig::{BOOT, Rig, SOON, nothing_left_behind, processes, says};

pub const CASES: &[crate::Case] = &[
    ("balloon::the_target_moves_the_hosts_memory", target),
    ("balloon::reporting_alone_gives_back_what_the_guest_frees", reporting),
    ("balloon::whole_huge_pages_go_back", huge_pages),
    ("balloon::a_guest_at_work_loses_nothing_by_targets_and_kills", at_work),
    ("balloon::hints_name_what_the_guest_has_no_use_for", hints),
];

const MIB: u64 = 1 << 20;

/// systemd's boot takes about 25 s in an emulated host that has a CPU of the machine for itself.
const SYSTEMD_BOOT: Duration = Duration::from_secs(300);

/// For hundreds of MiB to be written, or to go one way or the other, under an emulated CPU.
const MEMORY_MOVES: Duration = Duration::from_secs(240);

const KILLS: u32 = 12;

/// Bytes of guest memory that the host has in use, in whichever process it is mapped.
pub fn in_use(vm: &Vm) -> Outcome<u64> {
    let files =
        fs::read_dir(format!("/proc/{}/fd", vm.pid())).map_err(|error| format!("list files: {error}"))?;
    let is_memory = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:cleave-ram"))
    };
    let memory =
        files.flatten().map(|entry| entry.path()).find(is_memory).ok_or("the VMM has no memory file")?;
    let stat = fs::metadata(memory).map_err(|error| format!("look at guest memory: {error}"))?;
    Ok(stat.blocks() * 512)
}

/// The daemon's control socket.
struct Control(PathBuf);

impl Control {
    fn ask(&self, command: &str, arguments: Value) -> Outcome<Value> {
        let arguments: Map<String, Value> = arguments.as_object().cloned().unwrap_or_default();
        Client::connect(&self.0)
            .and_then(|mut client| client.call(command, &arguments, &[]))
            .map_err(|error| format!("{command}: {error}"))
    }

    /// The daemon may have been killed a moment ago.
    fn ask_patiently(&self, command: &str, arguments: &Value) -> Outcome<Value> {
        let deadline = Instant::now() + SOON;
        loop {
            match self.ask(command, arguments.clone()) {
                Ok(answer) => return Ok(answer),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn number(&self, key: &str) -> Outcome<u64> {
        let status = self.ask_patiently("status", &json!({}))?;
        status[key].as_u64().ok_or_else(|| format!("no {key} in {status}"))
    }

    /// Sets a target and waits until the guest has followed. Gives how long that took.
    fn reach(&self, mib: u64) -> Outcome<Duration> {
        let begun = Instant::now();
        self.ask_patiently("target", &json!({"size": mib * MIB}))?;
        wait_until(&format!("a guest of {mib} MiB"), || Ok(self.number("actual")? == mib * MIB))?;
        Ok(begun.elapsed())
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> Outcome<bool>) -> Outcome<()> {
    let deadline = Instant::now() + MEMORY_MOVES;
    while !is_so()? {
        if Instant::now() > deadline {
            return Err(format!("{what}: not within {MEMORY_MOVES:?}"));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn at_most(what: &str, bytes: u64, most: u64) -> Outcome<()> {
    if bytes <= most {
        return Ok(());
    }
    Err(format!("{what}: {} MiB, and {} MiB are too many", bytes / MIB, most / MIB))
}

/// The tiny guest with a balloon, and a shell.
fn start(rig: &Rig, memory: &str, balloon: &str) -> Outcome<(Vm, Control)> {
    let path = rig.path("balloon.ctl");
    let _ = fs::remove_file(&path);
    let balloon = format!("on,control={}{balloon}", path.display());
    let vm = rig.shell().with(["--memory", memory, "--balloon", &balloon]).start()?;
    vm.expect("SHELL", BOOT)?;
    let control = Control(path);
    wait_until("a driver", || Ok(control.ask_patiently("status", &json!({}))?["driver"] == true))?;
    Ok((vm, control))
}

/// Has the guest write `mib` MiB into a file in memory.
fn fill(vm: &mut Vm, mib: u64, mark: u32) -> Outcome<()> {
    vm.send(&format!(
        "mount -o remount,size=95% /tmp; dd if=/dev/zero of=/tmp/fill bs=1M count={mib} && echo FILLED-$(({mark} + 1))."
    ))?;
    vm.expect(&format!("FILLED-{}.", mark + 1), MEMORY_MOVES).map(drop)
}

fn power_off(mut vm: Vm) -> Outcome<()> {
    vm.send("poweroff -f")?;
    vm.finish(BOOT)?;
    nothing_left_behind()
}

fn target(rig: &Rig) -> Outcome<()> {
    let (mut vm, control) = start(rig, "1G", "")?;
    fill(&mut vm, 600, 1)?;
    vm.send("tr '\\0' x </tmp/fill | head -c 67108864 >/tmp/kept; rm /tmp/fill; echo KEPT-$((2 + 2)).")?;
    vm.expect("KEPT-4.", MEMORY_MOVES)?;
    let before = in_use(&vm)?;
    let down = control.reach(448)?;
    let small = in_use(&vm)?;
    eprintln!("1024 MiB to 448: {down:?}; the host has {} MiB in use, and had {}", small / MIB, before / MIB);
    at_most("the guest's memory", small, 448 * MIB)?;
    let up = control.reach(1024)?;
    eprintln!("448 MiB to 1024: {up:?}");
    fill(&mut vm, 600, 2)?;
    let large = in_use(&vm)?;
    if large < 664 * MIB {
        return Err(format!("the guest has 664 MiB of files, and the host says {} MiB", large / MIB));
    }
    vm.send("tr -d x </tmp/kept | wc -c; stat -c %s /tmp/kept; echo CHECKED-$((3 + 3)).")?;
    let said = vm.expect("CHECKED-6.", MEMORY_MOVES)?;
    says(&said, "\r\n0\r\n67108864\r\n")?;
    power_off(vm)
}

fn reporting(rig: &Rig) -> Outcome<()> {
    const FREED: u64 = 1536;
    let (mut vm, control) = start(rig, "2G", "")?;
    fill(&mut vm, FREED, 1)?;
    let used = in_use(&vm)?;
    let begun = Instant::now();
    vm.send("rm /tmp/fill; echo REMOVED-$((4 + 4)).")?;
    vm.expect("REMOVED-8.", SOON)?;
    let freed = begun.elapsed();
    let mut after_two = None;
    wait_until("95% of what the guest freed", || {
        let back = used.saturating_sub(in_use(&vm)?);
        if begun.elapsed() >= freed + Duration::from_secs(2) {
            after_two.get_or_insert(back);
        }
        Ok(back >= FREED * MIB * 95 / 100)
    })?;
    eprintln!(
        "{FREED} MiB freed within {freed:?}: 95% back after {:?}, {} MiB after 2 s; by reporting {} MiB",
        begun.elapsed(),
        after_two.unwrap_or(FREED * MIB) / MIB,
        control.number("given-back-by-reporting")? / MIB
    );
    power_off(vm)
}

fn huge_pages(rig: &Rig) -> Outcome<()> {
    let (mut vm, control) = start(rig, "size=512M,backing=hugetlbfs", ",min=64M")?;
    if control.number("host-page")? != 2 * MIB {
        return Err("guest memory is not in huge pages".to_owned());
    }
    fill(&mut vm, 300, 1)?;
    let used = in_use(&vm)?;
    vm.send("rm /tmp/fill; echo REMOVED-$((5 + 5)).")?;
    vm.expect("REMOVED-10.", SOON)?;
    let begun = Instant::now();
    wait_until("80% of what the guest freed", || Ok(used.saturating_sub(in_use(&vm)?) >= 240 * MIB))?;
    eprintln!("300 MiB freed in huge pages: 80% back after {:?}", begun.elapsed());
    fill(&mut vm, 300, 2)?;
    vm.send("rm /tmp/fill; echo REMOVED-$((6 + 6)).")?;
    vm.expect("REMOVED-12.", SOON)?;
    control.reach(256)?;
    let waiting = control.number("not-given-back")?;
    eprintln!("a balloon of 256 MiB: {} MiB of it are parts of huge pages", waiting / MIB);
    wait_until("the rest of it", || Ok(in_use(&vm)? <= 256 * MIB + waiting))?;
    control.reach(512)?;
    fill(&mut vm, 300, 3)?;
    vm.send("tr -d '\\0' </tmp/fill | wc -c; echo CHECKED-$((7 + 7)).")?;
    says(&vm.expect("CHECKED-14.", MEMORY_MOVES)?, "\r\n0\r\n")?;
    power_off(vm)
}

fn hints(rig: &Rig) -> Outcome<()> {
    let (vm, control) = start(rig, "512M", "")?;
    control.ask("hint", json!({"action": "start"}))?;
    wait_until("hints", || Ok(control.ask("query-hints", json!({}))?["stage"] == "complete"))?;
    let free = control.ask("query-hints", json!({}))?["free"].as_u64().unwrap_or(0);
    eprintln!("{} MiB of 512 are hinted", free / MIB);
    if !(128 * MIB..512 * MIB).contains(&free) {
        return Err(format!("{} MiB of 512 are said to be free", free / MIB));
    }
    control.ask("hint", json!({"action": "done"}))?;
    power_off(vm)
}

/// Ends the balloon's daemon, whichever it is at the moment.
fn kill(vm: &Vm) -> Outcome<()> {
    for pid in processes("cleave-balloon", Some(vm.pid())) {
        let status = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
        status.map_err(|error| format!("kill: {error}"))?;
    }
    Ok(())
}

/// A Debian with a memory checker and a disk checker at work, while its balloon grows and shrinks and its daemon dies.
fn at_work(rig: &Rig) -> Outcome<()> {
    let disk = std::env::var_os("LAB_DISK0").map(PathBuf::from).ok_or("there is no disk in $LAB_DISK0")?;
    let scratch = rig.blank("scratch", 64 * MIB)?;
    let control = Control(rig.path("balloon.ctl"));
    let mut command = rig.cleave(["run", "--kernel"]);
    command.arg(&rig.debian.kernel).arg("--initrd").arg(&rig.debian.initrd);
    command.args(["--append", "console=ttyS0 root=/dev/vda quiet", "--cpus", "2", "--memory", "768M"]);
    command.args(["--disk", &disk.display().to_string(), "--disk", &scratch.display().to_string()]);
    command.args(["--balloon", &format!("stats=1s,control={}", control.0.display())]);
    let mut vm = Vm::start(&mut command)?;
    vm.expect("cleave-guest login:", SYSTEMD_BOOT)?;
    vm.send("root")?;
    vm.expect("root@cleave-guest:~#", SYSTEMD_BOOT)?;
    // The first tests of memtester are quick, and write and read all of its memory.
    vm.send("(until [ -e /tmp/stop ]; do MEMTESTER_TEST_MASK=0x3f memtester 24M 1; done) >/tmp/mem 2>&1 &")?;
    vm.send("fio --name=v --filename=/dev/vdb --rw=randwrite --bs=16k --size=48M --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c --verify_backlog=64 --loops=1000 --time_based --runtime=3000 >/tmp/fio 2>&1 &")?;
    vm.send("sleep 1; echo WORKING-$((8 + 8)).")?;
    vm.expect("WORKING-16.", SOON)?;
    for kill_number in 0..KILLS {
        let mib = [320, 704, 400, 768][kill_number as usize % 4];
        control.ask_patiently("target", &json!({"size": mib * MIB}))?;
        thread::sleep(Duration::from_millis(u64::from(kill_number * 617 % 1900)));
        kill(&vm)?;
    }
    let down = control.reach(320)?;
    let small = in_use(&vm)?;
    eprintln!("{KILLS} kills; then 320 MiB within {down:?}: the host has {} MiB in use", small / MIB);
    at_most("the guest's memory", small, 320 * MIB)?;
    control.reach(768)?;
    let statistics = control.ask_patiently("stats", &json!({}))?;
    if statistics["guest"]["total"].as_u64().unwrap_or(0) < 600 * MIB {
        return Err(format!("the guest's statistics: {statistics}"));
    }
    vm.send(
        "touch /tmp/stop; pkill fio; wait; tail -3 /tmp/mem; tail -3 /tmp/fio; dmesg -l err,crit,alert,emerg",
    )?;
    vm.send("done=$(grep -c Done. /tmp/mem); echo FAILURES-$(grep -c FAILURE /tmp/mem)-BAD-$(grep -c 'verify: bad' /tmp/fio)-ROUNDS-$((done > 0)).")?;
    // A round of the memory checker is to end first.
    vm.expect("FAILURES-0-BAD-0-ROUNDS-1.", MEMORY_MOVES)?;
    vm.send("systemctl poweroff")?;
    vm.finish(SYSTEMD_BOOT)?;
    nothing_left_behind()
}
