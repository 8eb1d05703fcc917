//! Each test runs again in a process of its own, for a sandbox is never left.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};

use rustix::mm::{MapFlags, ProtFlags};

use super::*;

/// Which part of a test this process is: set in the one that is confined.
const ROLE: &str = "CLEAVE_TEST_ROLE";

fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// Runs the test `name` in another process, as `role`.
fn run_as(name: &str, role: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("sandbox::tests::{name}"), "--nocapture", "--test-threads=1"]);
    command.env(ROLE, role).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn close_sandbox() {
    let allowed = Allowed { syscalls: vec![libc::SYS_umask], ioctls: &[0x1277] };
    Confined { program: "test", allowed: Some(allowed), text: None }.filter_syscalls().unwrap();
}

#[test]
#[expect(unsafe_code, reason = "system calls that no safe function makes on purpose")]
fn a_violation_is_named() {
    if let Some(role) = role() {
        close_sandbox();
        match role.as_str() {
            "socket" => {
                let _ = UnixStream::pair();
            }
            "mmap" => {
                let (prot, flags) = (ProtFlags::READ | ProtFlags::EXEC, MapFlags::PRIVATE);
                // SAFETY: a new mapping, of no use to anybody.
                let _ = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), 4096, prot, flags) };
            }
            // SAFETY: system calls with integers only.
            "kill" => unsafe {
                libc::kill(1, 0);
            },
            // SAFETY: as above.
            "ioctl" => unsafe {
                libc::ioctl(2, libc::TIOCSTI, 0);
            },
            _ => {}
        }
        return;
    }
    for (role, name) in
        [("socket", "socketpair (53)"), ("mmap", "mmap (9)"), ("kill", "kill (62)"), ("ioctl", "ioctl")]
    {
        let output = run_as("a_violation_is_named", role);
        let line = format!("test: the sandbox stopped a thread of kind 'main': system call {name}");
        assert!(said(&output).contains(&line), "{}", said(&output));
        assert_eq!(output.status.code(), Some(1));
    }
}

#[test]
#[expect(unsafe_code, reason = "system calls that no safe function makes on purpose")]
fn what_serving_needs_works() {
    if role().is_some() {
        close_sandbox();
        // SAFETY: system calls with integers only; the ioctl is none of this descriptor's.
        unsafe {
            libc::umask(0o22);
            assert_eq!(libc::ioctl(2, 0x1277, 0), -1);
        }
        let kind = File::open("/dev/null").unwrap_err().kind();
        assert_eq!(kind, std::io::ErrorKind::PermissionDenied, "quietly, for the allocator does it");
        let fd = crate::shared::sealed_memfd("test", 4096).unwrap();
        crate::shared::map_sealed(fd, 0, 4096).unwrap();
        return;
    }
    let output = run_as("what_serving_needs_works", "serve");
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn files_are_out_of_reach() {
    if let Some(directory) = role() {
        let beside = Path::new(&directory).join("beside");
        if landlock::restrict(&[&beside.with_file_name("socket")]).unwrap() {
            assert!(File::open("/etc/passwd").is_err());
            assert!(File::create(beside.with_file_name("new")).is_err());
            assert!(fs::remove_file(Path::new(&directory).join("../other")).is_err());
            fs::remove_file(&beside).unwrap();
        }
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("run")).unwrap();
    fs::write(directory.path().join("other"), "").unwrap();
    fs::write(directory.path().join("run/beside"), "").unwrap();
    let output = run_as("files_are_out_of_reach", directory.path().join("run").to_str().unwrap());
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn memory_that_is_cut_off_ends_the_process_with_a_reason() {
    if role().is_some() {
        report_lost_memory().unwrap();
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        let file = vm_memory::FileOffset::new(File::from(fd.try_clone().unwrap()), 0);
        let region = vm_memory::MmapRegion::<()>::from_file(file, 4096).unwrap();
        rustix::fs::ftruncate(&fd, 0).unwrap();
        let _: u8 = vm_memory::Bytes::load(
            &vm_memory::VolatileMemory::as_volatile_slice(&region),
            0,
            std::sync::atomic::Ordering::Relaxed,
        )
        .unwrap();
        return;
    }
    let output = run_as("memory_that_is_cut_off_ends_the_process_with_a_reason", "cut");
    assert!(said(&output).contains("is gone: the frontend cut off the file"), "{}", said(&output));
    assert_eq!(output.status.code(), Some(135));
}
