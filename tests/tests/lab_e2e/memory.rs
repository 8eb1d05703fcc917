//! What guest memory is made of, where on the host it is, and what `cleave memory` says of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cleave_tests::vm::{Outcome, Vm};
use serde_json::Value;

use crate::rig::{BOOT, Guest, Rig, SOON, appears, nothing_left_behind, processes, says};

pub const CASES: &[crate::Case] = &[
    ("memory::a_mount_of_huge_pages_is_used_and_left_empty", mount),
    ("memory::a_mount_of_huge_pages_that_cannot_be_used_is_refused", refused_mounts),
    ("memory::huge_pages_that_a_cgroup_forbids_are_refused", cgroup_limit),
    ("memory::transparent_huge_pages_are_as_asked", transparent),
    ("memory::prefault_takes_all_of_it_with_several_threads", prefault),
    ("memory::it_comes_from_the_node_asked_for_whoever_touches_it", node),
    ("memory::huge_pages_come_from_the_node_asked_for", huge_pages_of_a_node),
    ("memory::it_is_left_out_of_dumps", dumps),
    ("memory::the_host_swaps_it_under_a_cgroup_and_nothing_is_lost", swap),
    ("memory::the_command_tells_of_every_process_that_shares_it", command),
    ("memory::the_command_refuses_what_is_no_machine", no_machine),
];

const USAGE: i32 = 2;
const HOST: i32 = 3;
const MIB: u64 = 1 << 20;
const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const CGROUPS: &str = "/sys/fs/cgroup";

/// Reads a disk, says READY and waits for a line.
const WAITS: &str = "dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null; echo READY; read -r line";

fn shell(script: &str) -> Outcome<()> {
    let status = Command::new("sh").args(["-euc", script]).status().map_err(|error| error.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("{status}: {script}")) }
}

fn read(path: impl AsRef<Path>) -> Outcome<String> {
    let path = path.as_ref();
    fs::read_to_string(path).map_err(|error| format!("read {}: {error}", path.display()))
}

fn write(path: impl AsRef<Path>, text: &str) -> Outcome<()> {
    let path = path.as_ref();
    fs::write(path, text).map_err(|error| format!("write {}: {error}", path.display()))
}

/// Something to be undone at the end of a case, however it ends.
struct Undo(String);

impl Drop for Undo {
    fn drop(&mut self) {
        let _ = shell(&self.0);
    }
}

/// A mounted hugetlbfs of 2 MiB pages.
fn mounted(rig: &Rig, name: &str, options: &str) -> Outcome<(PathBuf, Undo)> {
    let path = rig.path(name);
    fs::create_dir(&path).map_err(|error| error.to_string())?;
    shell(&format!("mount -t hugetlbfs -o pagesize=2M{options} hugetlbfs {}", path.display()))?;
    let undo = Undo(format!("umount {}", path.display()));
    Ok((path, undo))
}

fn memory(guest: Guest<'_>, keys: &str) -> Command {
    guest.with(["--memory", keys]).command()
}

/// The same as another user would run it: without root's privilege to pass by permissions.
fn without_override(inner: &Command) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-dac_override,-dac_read_search,-fowner", "--inh-caps=-all"]);
    command.arg(inner.get_program()).args(inner.get_args());
    command
}

fn ready(command: &mut Command) -> Outcome<Vm> {
    let vm = Vm::start(command)?;
    vm.expect("READY", BOOT)?;
    Ok(vm)
}

fn finish(mut vm: Vm) -> Outcome<()> {
    vm.send("go on")?;
    vm.finish(SOON)?;
    nothing_left_behind()
}

/// One line on standard error with all the `words`.
fn refused(command: &mut Command, code: i32, words: &[&str]) -> Outcome<()> {
    let exit = Vm::start(command)?.wait(SOON)?;
    exit.demand(code)?;
    words.iter().try_for_each(|words| says(&exit.errors, words))?;
    if exit.errors.lines().count() != 1 {
        return Err(format!("expected one line:\n{}", exit.errors));
    }
    nothing_left_behind()
}

/// What `cleave memory --json` says of one machine.
fn usage(rig: &Rig, vm: &Vm) -> Outcome<Value> {
    let output = rig.cleave(["memory", "--json", &vm.pid().to_string()]).output();
    let output = output.map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(&said)
        .map_err(|error| format!("{error}:\n{said}\n{}", String::from_utf8_lossy(&output.stderr)))?;
    Ok(report[0].clone())
}

/// A figure in bytes; `at` is a JSON pointer.
fn bytes(report: &Value, at: &str) -> Outcome<u64> {
    report.pointer(at).and_then(Value::as_u64).ok_or_else(|| format!("no {at} in {report:#}"))
}

fn demand(what: &str, holds: bool, report: &Value) -> Outcome<()> {
    if holds { Ok(()) } else { Err(format!("{what}:\n{report:#}")) }
}

fn mount(rig: &Rig) -> Outcome<()> {
    // As administrators have it: root's, for a group, and sticky. This process is of the group and not root otherwise.
    let (path, _undo) = mounted(rig, "huge", ",mode=1770,uid=65534,gid=0")?;
    let disk = rig.blank("disk", 1 << 20)?;
    let keys = format!("256M,mem-path={}", path.display());
    let guest = rig.guest(WAITS)?.disk(&disk, "");
    let vm = ready(&mut without_override(&memory(guest, &keys)))?;
    let report = usage(rig, &vm)?;
    let (guest, mapped) = (bytes(&report, "/guest")?, bytes(&report, "/processes/0/mapped")?);
    demand(
        "all of it is in huge pages",
        mapped > 0 && mapped == bytes(&report, "/processes/0/huge")?,
        &report,
    )?;
    demand("it has its size", guest == 256 * MIB, &report)?;
    let taken = bytes(&report, "/resident")?;
    demand("it is in whole pages", taken >= mapped && taken.is_multiple_of(2 * MIB), &report)?;
    let names = fs::read_dir(&path).map_err(|error| error.to_string())?.count();
    demand("no file has a name there", names == 0, &report)?;
    finish(vm)
}

fn refused_mounts(rig: &Rig) -> Outcome<()> {
    let try_path = |path: &Path, keys: &str, code, words: &[&str]| {
        let keys = format!("256M,mem-path={}{keys}", path.display());
        refused(&mut without_override(&memory(rig.shell(), &keys)), code, words)
    };
    try_path(
        Path::new("/nonexistent"),
        "",
        USAGE,
        &["mount -t hugetlbfs -o pagesize=2M,mode=1770,gid=kvm", "No such"],
    )?;
    try_path(&rig.path("."), "", USAGE, &["this is no hugetlbfs"])?;
    let (path, undo) = mounted(rig, "theirs", ",mode=1770,uid=65534,gid=65534")?;
    try_path(&path, "", HOST, &["mode 1770, owner 65534, group 65534", "chgrp kvm", "chmod 1770"])?;
    drop(undo);
    let (path, undo) = mounted(rig, "small", ",size=64M")?;
    try_path(&path, "", HOST, &["128 huge pages of 2M are needed", "limit leaves 32", "remount,size="])?;
    try_path(&path, ",page-size=1G,size=1G", USAGE, &["size' is given twice"])?;
    let keys = format!("1G,page-size=1G,mem-path={}", path.display());
    refused(
        &mut memory(rig.shell(), &keys),
        USAGE,
        &["page-size=1G is asked for, and that mount has pages of 2M"],
    )?;
    drop(undo);
    let (path, _undo) = mounted(rig, "huge", "")?;
    let keys = format!("1G,mem-path={}", path.display());
    refused(
        &mut memory(rig.shell(), &keys),
        HOST,
        &["too few huge pages of 2M: 512 are needed", "nr_hugepages"],
    )
}

/// A cgroup with a limit; what is started through it is in it.
struct Cgroup {
    path: PathBuf,
    _undo: Undo,
}

impl Cgroup {
    fn new(name: &str, controller: &str, limits: &[(&str, &str)]) -> Outcome<Self> {
        write(format!("{CGROUPS}/cgroup.subtree_control"), &format!("+{controller}"))?;
        let path = Path::new(CGROUPS).join(name);
        fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let undo = Undo(format!("rmdir {}", path.display()));
        limits.iter().try_for_each(|(file, limit)| write(path.join(file), limit))?;
        Ok(Self { path, _undo: undo })
    }

    fn start(&self, inner: &Command) -> Command {
        let mut command = Command::new("sh");
        command.args(["-euc", "echo $$ >\"$0\"/cgroup.procs; exec \"$@\""]).arg(&self.path);
        command.arg(inner.get_program()).args(inner.get_args());
        command
    }
}

fn cgroup_limit(rig: &Rig) -> Outcome<()> {
    let cgroup = Cgroup::new("cleave-huge", "hugetlb", &[("hugetlb.2MB.rsvd.max", "64M")])?;
    let inner = memory(rig.shell(), "256M,backing=hugetlbfs,page-size=2M");
    refused(&mut cgroup.start(&inner), HOST, &["a limit is in the way", "hugetlb.2MB.rsvd.max"])
}

fn transparent(rig: &Rig) -> Outcome<()> {
    let setting = read(SHMEM_ENABLED)?;
    let chosen = setting.split(['[', ']']).nth(1).unwrap_or("never").to_owned();
    let _undo = Undo(format!("echo {chosen} >{SHMEM_ENABLED}"));
    write(SHMEM_ENABLED, "never")?;
    refused(
        &mut memory(rig.shell(), "256M,thp=always"),
        HOST,
        &["thp=always", "shmem_enabled: never", "echo advise", "prefault=on"],
    )?;
    let disk = rig.blank("disk", 1 << 20)?;
    let boot = |keys: &str| -> Outcome<Vm> { ready(&mut memory(rig.guest(WAITS)?.disk(&disk, ""), keys)) };

    // Asked for: every page of the memory, although the host gives none by itself.
    let vm = boot("256M,thp=always,prefault=on")?;
    let report = usage(rig, &vm)?;
    let huge = bytes(&report, "/processes/0/huge")?;
    // A page that is busy at that moment stays small.
    demand("all of it is in huge pages", huge > 240 * MIB, &report)?;
    finish(vm)?;

    // As it is touched, where the host lets those have them that ask.
    write(SHMEM_ENABLED, "advise")?;
    let vm = boot("256M,thp=always")?;
    let report = usage(rig, &vm)?;
    let (huge, mapped) = (bytes(&report, "/processes/0/huge")?, bytes(&report, "/processes/0/mapped")?);
    // What the daemon touches first is small: it asks for nothing.
    demand("what is mapped is in huge pages", huge > mapped / 2, &report)?;
    finish(vm)?;

    // Not even where the host gives them to everyone, and not to the daemon either.
    write(SHMEM_ENABLED, "always")?;
    let vm = boot("256M,thp=never")?;
    let report = usage(rig, &vm)?;
    for process in [0, 1] {
        demand("no huge page", bytes(&report, &format!("/processes/{process}/huge"))? == 0, &report)?;
        let pid = bytes(&report, &format!("/processes/{process}/pid"))?;
        says(&read(format!("/proc/{pid}/status"))?, "THP_enabled:\t0")?;
    }
    finish(vm)
}

fn prefault(rig: &Rig) -> Outcome<()> {
    for keys in ["1G,prefault=on,prefault-threads=4", "512M,backing=hugetlbfs,page-size=2M,prefault=on"] {
        let disk = rig.blank("disk", 1 << 20)?;
        let vm = ready(&mut memory(rig.guest(WAITS)?.disk(&disk, ""), keys))?;
        let report = usage(rig, &vm)?;
        demand("no holes", bytes(&report, "/holes")? == 0, &report)?;
        let all = bytes(&report, "/guest")?;
        demand("all resident", bytes(&report, "/resident")? == all, &report)?;
        demand("all mapped", bytes(&report, "/processes/0/mapped")? == all, &report)?;
        let threads = fs::read_dir(format!("/proc/{}/task", vm.pid())).map_err(|error| error.to_string())?;
        let names: Vec<String> =
            threads.flatten().filter_map(|task| read(task.path().join("comm")).ok()).collect();
        demand(
            &format!("no thread of it is left: {names:?}"),
            !names.contains(&"prefault\n".into()),
            &report,
        )?;
        finish(vm)?;
    }
    Ok(())
}

/// The last NUMA node this process may use.
fn last_node() -> Outcome<u32> {
    let status = read("/proc/self/status")?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:"));
    let last = allowed.and_then(|list| list.trim().rsplit([',', '-']).next()?.parse().ok());
    last.ok_or_else(|| format!("no NUMA node in:\n{status}"))
}

/// Lines of numa_maps about guest memory.
fn placement(pid: u32) -> Outcome<Vec<String>> {
    let maps = read(format!("/proc/{pid}/numa_maps"))?;
    Ok(maps.lines().filter(|line| line.contains("cleave-ram")).map(str::to_owned).collect())
}

fn only_on(node: u32, lines: &[String]) -> Outcome<()> {
    let elsewhere = |line: &String| {
        line.split_whitespace().any(|word| {
            let on = word.strip_prefix('N').and_then(|word| word.split_once('=')?.0.parse::<u32>().ok());
            on.is_some_and(|on| on != node)
        })
    };
    let there = lines.iter().any(|line| line.contains(&format!(" N{node}=")));
    match !there || lines.iter().any(elsewhere) {
        true => Err(format!("memory that is not on node {node}:\n{}", lines.join("\n"))),
        false => Ok(()),
    }
}

fn node(rig: &Rig) -> Outcome<()> {
    let node = last_node()?;
    let disk = rig.blank("disk", 16 << 20)?;
    let keys = format!("256M,host-node={node}");
    let vm = ready(&mut memory(rig.guest(WAITS)?.disk(&disk, ""), &keys))?;
    only_on(node, &placement(vm.pid())?)?;
    // What it read the disk into, the daemon touched first.
    let daemon = processes("cleave-block", Some(vm.pid()));
    only_on(node, &placement(*daemon.first().ok_or("no daemon")?)?)?;
    finish(vm)?;
    refused(
        &mut memory(rig.shell(), "256M,host-node=900"),
        USAGE,
        &["host-node=900", "NUMA node", "cpuset.mems"],
    )
}

fn huge_pages_of_a_node(rig: &Rig) -> Outcome<()> {
    let node = last_node()?;
    let pool = format!("/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/free_hugepages");
    let free: u64 = read(&pool)?.trim().parse().map_err(|error| format!("{pool}: {error}"))?;
    let keys = |pages: u64| format!("{}M,backing=hugetlbfs,page-size=2M,host-node={node}", pages * 2);
    let vm = ready(&mut memory(rig.guest("echo READY; read -r line")?, &keys(free - 8)))?;
    let report = usage(rig, &vm)?;
    demand("all of it is taken at once", bytes(&report, "/holes")? == 0, &report)?;
    only_on(node, &placement(vm.pid())?)?;
    finish(vm)?;
    // Elsewhere there are enough. Without other nodes, there are not, and the pool itself says so.
    let words = format!("{} are needed, {free} are free", free + 1);
    refused(&mut memory(rig.shell(), &keys(free + 1)), HOST, &[&words, "nr_hugepages"])
}

/// Whether all mappings of guest memory are left out of core dumps (VmFlags: dd).
fn left_out(pid: u32) -> Outcome<bool> {
    let smaps = read(format!("/proc/{pid}/smaps"))?;
    let mut of_memory = false;
    let mut flags = Vec::new();
    for line in smaps.lines() {
        match line.strip_prefix("VmFlags:") {
            Some(words) if of_memory => flags.push(words.split_whitespace().any(|flag| flag == "dd")),
            Some(_) => {}
            None if line.contains(" /") || line.contains("-") && line.contains(":") => {
                of_memory = line.contains("cleave-ram");
            }
            None => {}
        }
    }
    if flags.is_empty() { Err(format!("{pid} maps no guest memory")) } else { Ok(flags.iter().all(|dd| *dd)) }
}

fn dumps(rig: &Rig) -> Outcome<()> {
    let disk = rig.blank("disk", 1 << 20)?;
    for (keys, of_vmm) in [("128M", false), ("128M,dump=off", true)] {
        let vm = ready(&mut memory(rig.guest(WAITS)?.disk(&disk, ""), keys))?;
        let daemon = *processes("cleave-block", Some(vm.pid())).first().ok_or("no daemon")?;
        let found = (left_out(vm.pid())?, left_out(daemon)?);
        if found != (of_vmm, true) {
            return Err(format!("{keys}: left out of the dumps of VMM and daemon: {found:?}"));
        }
        finish(vm)?;
    }
    Ok(())
}

fn swap(rig: &Rig) -> Outcome<()> {
    let disk = std::env::var("LAB_DISK1").map_err(|_| "there is no disk in $LAB_DISK1")?;
    shell(&format!("[ -b {disk} ] || fallocate -l 1G {disk}; mkswap {disk} >/dev/null; swapon {disk}"))?;
    let _undo = Undo(format!("swapoff {disk}"));
    let cgroup = Cgroup::new("cleave-swap", "memory", &[("memory.max", "160M")])?;
    let script = "
        cd /tmp; dd if=/dev/urandom of=a bs=1M count=64 2>/dev/null; cp a b; cp a c
        echo READY; read -r line; md5sum a b c; echo 1 >a; md5sum b c; echo CHECKED";
    let data = rig.blank("disk", 1 << 20)?;
    let guest = rig.guest(script)?.disk(&data, "");
    let mut vm = ready(&mut cgroup.start(&memory(guest, "512M")))?;
    let report = usage(rig, &vm)?;
    let [all, resident, swapped, holes] =
        ["/guest", "/resident", "/swapped", "/holes"].map(|at| bytes(&report, at));
    let (all, resident, swapped, holes) = (all?, resident?, swapped?, holes?);
    demand("much of it is swapped out", swapped > 32 * MIB, &report)?;
    demand("the rest is within the limit", resident <= 160 * MIB, &report)?;
    demand("nothing is missing", all == resident + swapped + holes, &report)?;
    vm.send("go on")?;
    vm.expect("CHECKED", BOOT)?;
    let exit = vm.finish(SOON)?;
    let sums: Vec<&str> = exit
        .screen
        .lines()
        .filter(|line| line.trim_end().ends_with(['a', 'b', 'c']))
        .filter_map(|line| line.split_whitespace().next().filter(|sum| sum.len() == 32))
        .collect();
    if sums.len() != 5 || sums.iter().any(|sum| *sum != sums[0]) {
        return Err(format!("the sums of what was swapped: {sums:?}\n{}", exit.screen));
    }
    nothing_left_behind()
}

fn command(rig: &Rig) -> Outcome<()> {
    let (ours, theirs) = (rig.blank("ours", 1 << 20)?, rig.blank("theirs", 1 << 20)?);
    let socket = rig.path("theirs.sock");
    let mut daemon = rig.program("cleave-block");
    let daemon = Vm::start(daemon.arg("--socket-path").arg(&socket).arg("--blk-file").arg(&theirs))?;
    appears(&socket)?;
    let script = "dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null
        dd if=/dev/vdb of=/dev/null bs=64k 2>/dev/null; echo READY; read -r line";
    let guest = rig.guest(script)?.disk(&ours, "").device("block", &socket);
    let vm = ready(&mut memory(guest, "256M"))?;
    let report = usage(rig, &vm)?;
    let names: Vec<_> =
        (0..3).filter_map(|at| report.pointer(&format!("/processes/{at}/name"))?.as_str()).collect();
    demand(
        "the VMM, its daemon, the other one",
        names == ["cleave", "cleave-block", "cleave-block"],
        &report,
    )?;
    let attached =
        (1..3).any(|at| bytes(&report, &format!("/processes/{at}/pid")) == Ok(daemon.pid().into()));
    demand("the one that someone else runs", attached, &report)?;
    for at in 0..3 {
        let (pid, own) = (
            bytes(&report, &format!("/processes/{at}/pid"))?,
            bytes(&report, &format!("/processes/{at}/own"))?,
        );
        demand(
            "it has guest memory mapped",
            bytes(&report, &format!("/processes/{at}/mapped"))? > 0,
            &report,
        )?;
        // The guest waits, so the kernel says the same now: guest memory's share and its own are all there is.
        let rollup = read(format!("/proc/{pid}/smaps_rollup"))?;
        let pss: u64 = rollup
            .lines()
            .find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB")?.parse().ok())
            .ok_or_else(|| format!("no Pss in:\n{rollup}"))?;
        demand(&format!("its own memory is part of {pss} KiB"), 0 < own && own < pss << 10, &report)?;
    }
    let all = [bytes(&report, "/resident")?, bytes(&report, "/swapped")?, bytes(&report, "/holes")?];
    demand("all of it is somewhere or nowhere", all.iter().sum::<u64>() == 256 * MIB, &report)?;

    let table = rig.cleave(["memory"]).output().map_err(|error| error.to_string())?;
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    println!("{table}");
    for words in [vm.pid().to_string(), daemon.pid().to_string(), "  cleave-block".into(), "RESIDENT".into()]
    {
        says(&table, &words)?;
    }
    drop(daemon);
    finish(vm)
}

fn no_machine(rig: &Rig) -> Outcome<()> {
    let disk = rig.blank("disk", 1 << 20)?;
    let none = rig.cleave(["memory", "--json"]).output().map_err(|error| error.to_string())?;
    says(&String::from_utf8_lossy(&none.stdout), "[]")?;
    let vm = ready(&mut memory(rig.guest(WAITS)?.disk(&disk, ""), "128M"))?;
    let daemon = *processes("cleave-block", Some(vm.pid())).first().ok_or("no daemon")?;
    for (pid, words) in [
        (daemon.to_string(), format!("give that one's pid, {}", vm.pid())),
        (std::process::id().to_string(), "is no machine; give the pid of a `cleave run`".to_owned()),
        ("4000000".to_owned(), "no process has this pid".to_owned()),
    ] {
        let exit = Vm::start(&mut rig.cleave(["memory", &pid]))?.wait(SOON)?;
        exit.demand(USAGE)?;
        says(&exit.errors, &words)?;
    }
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    nobody.arg(rig.daemon("cleave")).args(["memory", &vm.pid().to_string()]);
    let exit = Vm::start(&mut nobody)?.wait(SOON)?;
    exit.demand(HOST)?;
    says(&exit.errors, "run this as root")?;
    finish(vm)
}
