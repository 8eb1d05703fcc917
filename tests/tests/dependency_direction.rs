//! The VMM and the daemons meet only in `common` and on the socket: neither may come to depend on the other. Inside the
//! VMM, modules are on floors, and use only what is on floors below.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

type Graph = BTreeMap<String, BTreeSet<String>>;

/// The workspace's crates, each with the crates of the workspace that it depends on, in whatever way.
fn workspace() -> Graph {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let name = |value: &serde_json::Value| value["name"].as_str().expect("a name").to_owned();
    let members: BTreeSet<String> = packages.iter().map(name).collect();
    packages
        .iter()
        .map(|package| {
            let needs = package["dependencies"].as_array().expect("dependencies").iter().map(name);
            (name(package), needs.filter(|need| members.contains(need)).collect())
        })
        .collect()
}

fn may_depend_on(package: &str) -> &'static [&'static str] {
    match package {
        "cleave-common" => &[],
        "cleave" | "cleave-runtime" | "cleave-storage" => &["cleave-common"],
        // The tests play every part, but through sockets and command lines.
        "cleave-tests" => &["cleave-common"],
        "cleave-block" | "cleave-scsi" => &["cleave-common", "cleave-runtime", "cleave-storage"],
        daemon if daemon.starts_with("cleave-") => &["cleave-common", "cleave-runtime"],
        other => panic!("the crate {other} has no place in the order of dependencies yet: give it one here"),
    }
}

#[test]
fn dependencies_point_one_way() {
    let workspace = workspace();
    assert!(workspace.contains_key("cleave") && workspace.contains_key("cleave-block"));
    for (package, needs) in &workspace {
        for need in needs {
            assert!(
                may_depend_on(package).contains(&need.as_str()),
                "{package} must not depend on {need}: it may depend on {:?}",
                may_depend_on(package)
            );
        }
    }
}

/// The floors of the VMM, from the top; see vmm/docs/architecture.md.
const FLOORS: &[&[&str]] = &[
    &["main"],
    &["machine", "cli", "check", "usage", "attach"],
    &["virtio", "legacy"],
    &["pci", "daemon", "arch"],
    &["vhost", "kvm", "plan"],
    &["bus", "memory", "control", "config", "sandbox"],
];

fn floor(module: &str) -> usize {
    let found = FLOORS.iter().position(|floor| floor.contains(&module));
    found.unwrap_or_else(|| panic!("the module {module} of the VMM has no floor yet: give it one here"))
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let entries =
        fs::read_dir(directory).expect("the VMM's sources").map(|entry| entry.expect("an entry").path());
    let (directories, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let files = files.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    directories.iter().flat_map(|directory| rust_files(directory)).chain(files).collect()
}

/// The top-level modules that code names as `crate::MODULE`, one or several in braces.
fn modules_used(code: &str) -> BTreeSet<String> {
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code: String = lines.flat_map(|line| [line, "\n"]).collect();
    let word =
        |text: &str| text.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect::<String>();
    let mut used = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            None => {
                used.insert(word(rest));
            }
            Some(list) => {
                let mut depth = 0;
                let mut first = true;
                for (at, c) in list.char_indices() {
                    if first && depth == 0 && c.is_ascii_alphabetic() {
                        used.insert(word(&list[at..]));
                        first = false;
                    }
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => first = true,
                        _ => {}
                    }
                }
            }
        }
    }
    used
}

#[test]
fn modules_used_are_found() {
    let code = "use crate::bus;\n// crate::not\nuse crate::{\n    kvm::{Vm, irq::Gsi},\n    plan,\n};\ncrate::memory::x();";
    let used: Vec<_> = modules_used(code).into_iter().collect();
    assert_eq!(used, ["bus", "kvm", "memory", "plan"]);
}

#[test]
fn modules_of_the_vmm_use_only_floors_below() {
    let top = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../vmm/src"));
    let mut arrows = 0;
    for file in rust_files(top) {
        let inside = file.strip_prefix(top).expect("below the top");
        let module = inside.iter().next().and_then(|first| Path::new(first).file_stem()).expect("a module");
        let module = module.to_str().expect("UTF-8");
        for used in modules_used(&fs::read_to_string(&file).expect("readable")) {
            if used == module {
                continue;
            }
            arrows += 1;
            assert!(
                floor(module) < floor(&used),
                "{}: '{module}' must not use '{used}': it is not on a floor below",
                inside.display()
            );
        }
    }
    assert!(arrows > 40, "only {arrows} uses were found: does this test still read the sources?");
}
