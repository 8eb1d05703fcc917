use clap::CommandFactory;
use cleave_common::cli::one_line;

use super::*;

fn refuse(words: &[&str]) -> String {
    let words = ["cleave", "run"].iter().chain(words);
    let said = one_line(&Cli::try_parse_from(words).unwrap_err());
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

fn run(words: &[&str]) -> Result<MachineConfig, Failure> {
    let words = ["cleave", "run", "--kernel", "vmlinuz"].iter().chain(words);
    let Command::Run(arguments) = Cli::try_parse_from(words).unwrap().command else { panic!("not run") };
    arguments.into_config()
}

#[test]
fn the_commands_are_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn a_mistake_is_one_line_that_names_the_nearest_word() {
    let said = one_line(&Cli::try_parse_from(["cleave", "chek"]).unwrap_err());
    assert_eq!(
        said,
        "unrecognized subcommand 'chek'; a similar subcommand exists: 'check' (--help says more)"
    );
    for (words, message) in [
        (
            &["--kernal", "x"][..],
            "unexpected argument '--kernal' found; a similar argument exists: '--kernel'",
        ),
        (&["--disk", "x,redonly=on"], "did you mean 'readonly'?"),
        (&["--disk", "x,queues"], "'queues' needs a value: queues=N"),
        (&["--disk", "x,cache"], "'cache' needs a value: cache=none|writeback|writethrough"),
        (&["--disk", "x,serial"], "'serial' needs a value"),
        (&["--disk", "readonly=on"], "'path=' is missing"),
        (&["--cpus", "abc"], "invalid value 'abc' for '--cpus <N>': a machine has 1 to 64 vCPUs"),
        (&["--cpus", "-1"], "--cpus"),
        (&["--memory", "lots"], "size: 'lots'"),
        (&["--uart", "file="], "'file=' needs a path: file=PATH"),
        (&["--uart", "unix"], "'unix' needs a path: unix=PATH"),
        (&["--sandbox", "maybe"], "it is on or off"),
        (&["--disk", "x,on_full=pause"], "unknown key 'on_full' (did you mean 'on-full'?)"),
        (
            &["--disk", "x,throttle=5"],
            "'throttle' has no value but keys of its own: throttle.iops-total=VALUE",
        ),
        (
            &["--disk", "x,throttle.bps_total=5"],
            "throttle: unknown key 'bps_total' (did you mean 'bps-total'?)",
        ),
        (&["--net", "non"], "'non' is not one of: none, user (did you mean 'none'?)"),
        (
            &["--net", "user,hostfwd=tcp:22"],
            "hostfwd: 'tcp:22' is no forwarded port: there have to be two ports",
        ),
        (&["--net", "tpa=tap0"], "did you mean 'tap'?"),
        (&["--net", "tap=a,mac=52:54"], "mac: '52:54' is no Ethernet address"),
        (&["--device", "type=rng"], "'socket=' is missing"),
        (&["--device", "type=rgn,socket=x"], "did you mean 'rng'?"),
    ] {
        let said = refuse(words);
        assert!(said.contains(message), "{words:?}: {said}");
    }
}

#[test]
fn what_is_off_is_off() {
    assert!(run(&[]).unwrap().sandbox);
    assert!(!run(&["--sandbox", "off"]).unwrap().sandbox);
    assert!(
        run(&["--cpus", "70000"]).unwrap_err().to_string().contains("--cpus 70000: a machine has 1 to 64")
    );
}

#[test]
fn a_file_that_is_none_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let refuse = |content: &[u8]| {
        let path = directory.path().join("vm.toml");
        std::fs::write(&path, content).unwrap();
        let path = path.to_str().unwrap();
        let failure = run(&["--config", path]).unwrap_err();
        assert_eq!(failure.code as u8, 2);
        let said = failure.to_string();
        assert_eq!(said.lines().count(), 1, "{said}");
        said.strip_prefix(&format!("--config {path}: ")).unwrap().to_owned()
    };
    assert_eq!(
        refuse(b"cpus = 2\nkernal = 'x'\n")[..],
        *"line 2: unknown key 'kernal' (did you mean 'kernel'?); the \
        keys are: kernel, initrd, append, cpus, memory, uart, console, serial, sandbox, name, qmp, disk, net, balloon, scsi, cdrom, scsi-controller, device"
    );
    assert!(refuse(b"\x7fELF\x02\x01").starts_with("line 1: this is no TOML"));
    assert_eq!(refuse(b"abc\xff"), "it is no text file: the bytes from 3 on are not UTF-8");
    assert!(refuse(&vec![b'#'; 2 << 20]).contains("larger than 1 MiB"));
    let failure = run(&["--config", "/nonexistent/vm.toml"]).unwrap_err();
    assert_eq!(failure.code as u8, 2);
    assert!(failure.to_string().starts_with("--config /nonexistent/vm.toml: No such file"), "{failure}");
}
