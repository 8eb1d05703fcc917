//! What the tests stand on: a laboratory with a real KVM on any machine, guests to boot in it, and the
//! Debian packages both are made of.
//!
//! Everything here is made once, from packages that Debian signs, and kept under `target/lab`; see [`cache`].

pub mod cache;
pub mod conformance;
pub mod cpio;
pub mod debian;
pub mod dpdk;
pub mod driver;
pub mod error;
pub mod guest;
pub mod interruption;
pub mod kernel;
pub mod lab;
pub mod network;
pub mod passt;
pub mod peers;
pub mod qemu;
pub mod survival;
pub mod tools;
pub mod vm;
