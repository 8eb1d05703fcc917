//! `cleave` as a program, as far as it goes without a guest: what it says, and its exit codes.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

fn cleave() -> Command {
    Command::new(env!("CARGO_BIN_EXE_cleave"))
}

/// Runs what has to be refused: nothing on standard output, one line on standard error, which is returned.
fn refused(command: &mut Command, code: i32) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let said = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(code), "{status}: {said}");
    assert!(stdout.is_empty(), "{}", String::from_utf8_lossy(&stdout));
    assert_eq!(said.lines().count(), 1, "{said}");
    said.trim_end().to_owned()
}

#[test]
fn mistakes_on_the_command_line_are_one_line_and_exit_code_2() {
    let run = |words: &[&str]| refused(cleave().arg("run").args(words), 2);
    assert_eq!(
        run(&["--memroy", "1G"]),
        "cleave: unexpected argument '--memroy' found; a similar argument exists: '--memory' (--help says more)"
    );
    assert!(run(&["--cpus", "abc"]).contains("a machine has 1 to 64 vCPUs"));
    assert!(
        run(&["--kernel", "/nonexistent/vmlinuz"])
            .starts_with("cleave: --kernel /nonexistent/vmlinuz: No such file")
    );
    assert!(run(&["--kernel", "/etc"]).contains("/etc: is a directory"));
    assert!(run(&["--kernel", "x", "--disk", "d,id=a/b"]).contains("id=\"a/b\": a device's name is"));
    let long = format!("unix=/{}", "x".repeat(200));
    assert!(run(&["--kernel", "x", "--uart", &long]).contains("at most 107"));
}

#[test]
fn a_kernel_that_cannot_be_started_is_refused_before_anything_is_touched() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("vmlinuz");
    // A bzImage that promises more than it has, for a machine whose daemon does not exist either.
    let mut bytes = vec![0; 4096];
    bytes[0x1f1] = 1;
    bytes[0x1f4..0x1f8].copy_from_slice(&(1_u32 << 20).to_le_bytes());
    bytes[0x201] = 0x6a;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    bytes[0x236] = 1;
    fs::write(&kernel, &bytes).unwrap();
    let said = refused(
        cleave().args(["run", "--device", "type=rng,socket=/nonexistent/rng.sock", "--kernel"]).arg(&kernel),
        2,
    );
    let start = format!("cleave: --kernel {}: the file ends early", kernel.display());
    assert!(said.starts_with(&start), "{said}");
}

/// Root reads everything, so as root this runs without that privilege.
#[test]
fn files_that_may_not_be_read_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("vmlinuz");
    fs::write(&kernel, "kernel").unwrap();
    fs::set_permissions(&kernel, fs::Permissions::from_mode(0o000)).unwrap();
    let mut command = if rustix::process::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]);
        command.arg(env!("CARGO_BIN_EXE_cleave"));
        command
    } else {
        cleave()
    };
    let said = refused(command.args(["run", "--kernel"]).arg(&kernel), 2);
    assert!(said.contains(&format!("--kernel {}: Permission denied", kernel.display())), "{said}");
}

#[test]
fn check_is_read_by_programs_and_says_whether_a_guest_runs() {
    let output = cleave().args(["check", "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let runs = report["runs_stock_guest"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(if runs { 0 } else { 3 }));
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.iter().any(|check| check["name"] == "memory" && check["status"] == "ok"), "{report}");
    assert!(output.stderr.is_empty());

    let output = cleave().arg("check").output().unwrap();
    assert_eq!(output.status.code(), Some(if runs { 0 } else { 3 }));
    assert!(String::from_utf8(output.stdout).unwrap().contains("This host"));
}

#[test]
fn a_report_that_nobody_gets_is_exit_code_1_and_said() {
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let said = refused(cleave().arg("check").stdout(full()), 1);
    assert!(said.starts_with("cleave: cannot write the report to standard output: No space left"), "{said}");
    let said = refused(cleave().arg("--help").stdout(full()), 1);
    assert!(said.starts_with("cleave: cannot write to standard output: No space left"), "{said}");
}

#[test]
fn help_and_version_are_on_standard_output() {
    for word in ["--help", "--version"] {
        let Output { status, stdout, stderr } = cleave().arg(word).output().unwrap();
        assert!(
            status.success()
                && stderr.is_empty()
                && stdout.starts_with(if word == "--help" { b"A vir" } else { b"cleav" })
        );
    }
    let help = cleave().args(["run", "--help"]).output().unwrap().stdout;
    assert!(String::from_utf8(help).unwrap().contains("--sandbox <on|off>"));
}
