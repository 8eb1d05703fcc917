//! Tells the tests whether there is a /dev/kvm, even a software one, so that those that need it say so where it is
//! missing instead of failing or passing for nothing.

use std::fs::OpenOptions;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(no_kvm)");
    println!("cargo::rerun-if-changed=/dev/kvm");
    if OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        println!("cargo::rustc-cfg=no_kvm");
    }
}
