//! The VMM and the daemons meet only in `common` and on the socket: neither may come to depend on the other.

use std::collections::{BTreeMap, BTreeSet};
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
