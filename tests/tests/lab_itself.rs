//! The lab keeps its promises: exit codes, files, time limits, and clear words when its machine dies.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use cleave_tests::cache::Cache;
use cleave_tests::error::{Error, Result};
use cleave_tests::lab::{Disk, Job, Lab, Place};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let lab = match Cache::open().and_then(|cache| Lab::open(&cache)) {
        Ok(lab) => lab,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let lab: &'static Lab = Box::leak(Box::new(lab));
    // On a machine with a KVM of its own there is no emulated machine to look at.
    let emulated_only = lab.place() == Place::Host;
    let case = |name: &str, case: fn(&Lab) -> Result<()>| {
        Trial::test(name, move || case(lab).map_err(|error| Failed::from(error.to_string())))
    };
    let trials = vec![
        case("a_job_has_kvm_and_its_exit_code_comes_back", exit_code),
        case("a_job_at_its_time_limit_is_stopped", time_limit),
        case("disks_are_dropped_or_kept_as_asked", disks),
        case("what_a_job_writes_stays_in_its_machine", writes_stay).with_ignored_flag(emulated_only),
        case("a_machine_that_dies_leaves_its_console", death).with_ignored_flag(emulated_only),
        case("a_machine_that_freezes_is_stopped", freeze).with_ignored_flag(emulated_only),
        case("an_instruction_clock_repeats", instruction_clock).with_ignored_flag(emulated_only),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn check(holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Refused(what())) }
}

fn exit_code(lab: &Lab) -> Result<()> {
    let script =
        "test -c /dev/kvm; cat \"$LAB/input\"; echo trouble >&2; echo made >\"$LAB/output\"; exit 42";
    let directory = lab.directory()?;
    fs::write(directory.share().join("input"), "given").map_err(io)?;
    let outcome = lab.run(&Job::script(script), directory)?;
    let made = fs::read_to_string(outcome.directory.share().join("output")).map_err(io)?;
    let holds = outcome.code == 42
        && outcome.stdout == "given"
        && outcome.stderr == "trouble\n"
        && made == "made\n"
        && outcome.directory.path().exists();
    check(holds, || format!("{outcome:?}"))
}

fn time_limit(lab: &Lab) -> Result<()> {
    let mut job = Job::script("sleep 1000");
    job.time_limit = Duration::from_secs(12);
    match lab.run(&job, lab.directory()?) {
        Err(Error::TimeLimit { seconds: 12, .. }) => Ok(()),
        other => check(false, || format!("{other:?}")),
    }
}

fn disks(lab: &Lab) -> Result<()> {
    let directory = tempfile::tempdir().map_err(io)?;
    let [dropped, kept] = ["dropped, with a comma", "kept"].map(|name| directory.path().join(name));
    let mut job = Job::script(
        "for disk in $LAB_DISK0 $LAB_DISK1; do printf new | dd of=$disk conv=notrunc; done; sync",
    );
    for (path, persistent) in [(&dropped, false), (&kept, true)] {
        fs::write(path, [b'.'; 65536]).map_err(io)?;
        job.disks.push(Disk { path: path.clone(), persistent });
    }
    let outcome = lab.run(&job, lab.directory()?)?;
    check(outcome.code == 0, || format!("{outcome:?}"))?;
    check(fs::read(&dropped).map_err(io)?.starts_with(b"..."), || "a dropped write is there".to_owned())?;
    check(fs::read(&kept).map_err(io)?.starts_with(b"new"), || "a kept write is not there".to_owned())
}

fn writes_stay(lab: &Lab) -> Result<()> {
    let file = tempfile::NamedTempFile::new().map_err(io)?;
    fs::write(file.path(), "before").map_err(io)?;
    let script = format!("echo after >{0}; cat {0}", file.path().display());
    let outcome = lab.run(&Job::script(&script), lab.directory()?)?;
    check(outcome.stdout == "after\n", || format!("{outcome:?}"))?;
    check(fs::read_to_string(file.path()).map_err(io)? == "before", || "the host's file changed".to_owned())
}

fn death(lab: &Lab) -> Result<()> {
    match lab.run(&Job::script("echo c >/proc/sysrq-trigger; sleep 10"), lab.directory()?) {
        Err(Error::MachineDied { tail, console, .. }) => {
            let console = fs::read_to_string(console).map_err(io)?;
            check(console.contains("sysrq"), || format!("the console says nothing of it: {tail}"))
        }
        other => check(false, || format!("{other:?}")),
    }
}

/// The CPU time of the same work in two machines.
fn freeze(lab: &Lab) -> Result<()> {
    // A kernel that neither goes on nor ends.
    let mut job = Job::script("echo 0 >/proc/sys/kernel/panic; echo c >/proc/sysrq-trigger");
    job.silence_limit = Duration::from_secs(15);
    match lab.run(&job, lab.directory()?) {
        Err(Error::Frozen { seconds: 15, .. }) => Ok(()),
        other => check(false, || format!("{other:?}")),
    }
}

fn instruction_clock(lab: &Lab) -> Result<()> {
    let measure = || {
        // The shell's own time on a CPU, in nanoseconds.
        let script = "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done; read -r ran rest </proc/$$/schedstat; echo $ran";
        let mut job = Job::script(script);
        job.instruction_clock = true;
        let outcome = lab.run(&job, lab.directory()?)?;
        outcome.stdout.trim().parse::<f64>().map_err(|_| Error::Refused(format!("{outcome:?}")))
    };
    let (first, second) = (measure()?, measure()?);
    let ratio = first / second;
    check((0.95..=1.05).contains(&ratio), || format!("{first} ns, then {second} ns"))
}

fn io(source: std::io::Error) -> Error {
    Error::Io { what: "use a test's file".to_owned(), source }
}
