//! The host's NUMA nodes: which of them this process may use, and what they have.

use std::fmt::Display;
use std::fs;

use cleave_common::cpus::CpuList;

use super::MemoryError;
use super::host::HugePages;

const NODES: &str = "/sys/devices/system/node";

/// Nodes that guest memory is bound to, each of them usable.
#[derive(Debug, Clone)]
pub(super) struct Nodes(CpuList);

impl Nodes {
    /// `None` for an empty list: anywhere.
    pub(super) fn new(nodes: &[usize]) -> Result<Option<Self>, MemoryError> {
        if nodes.is_empty() {
            return Ok(None);
        }
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let allowed = allowed(&status).ok_or(MemoryError::NoNuma)?;
        if fs::metadata(NODES).is_err() {
            return Err(MemoryError::NoNuma);
        }
        Self::among(nodes, &allowed).map(Some)
    }

    fn among(nodes: &[usize], allowed: &CpuList) -> Result<Self, MemoryError> {
        match nodes.iter().find(|node| !allowed.cpus().contains(node)) {
            Some(node) => Err(MemoryError::NoSuchNode(*node, named(allowed))),
            None => Ok(Self(nodes.iter().copied().collect())),
        }
    }

    /// Bit *n* of word *n* / 64 is node *n*.
    pub(super) fn mask(&self) -> Vec<u64> {
        let words = self.0.cpus().iter().max().map_or(0, |last| last / 64 + 1);
        let mut mask = vec![0; words];
        self.0.cpus().iter().for_each(|node| mask[node / 64] |= 1 << (node % 64));
        mask
    }

    /// Refuses more ordinary memory than the nodes have.
    pub(super) fn require_memory(&self, size: u64) -> Result<(), MemoryError> {
        let has: u64 = self.0.cpus().iter().filter_map(|node| memory_of(*node)).sum();
        match size > has {
            true => Err(MemoryError::MoreThanNodes { nodes: self.to_string(), size, has }),
            false => Ok(()),
        }
    }

    /// Refuses more huge pages than the nodes have free.
    pub(super) fn require_huge_pages(&self, pool: &HugePages, needed: u64) -> Result<(), MemoryError> {
        let figure = |node: &usize, file: &str| -> Option<u64> {
            let path = self.pool_of(*node, pool, file);
            fs::read_to_string(path).ok()?.trim().parse().ok()
        };
        let free = self.0.cpus().iter().filter_map(|node| figure(node, "free_hugepages")).sum();
        if free >= needed {
            return Ok(());
        }
        let first = self.0.cpus()[0];
        Err(MemoryError::TooFewHugePages {
            page_size: pool.size,
            place: format!(" on {}", named(&self.0)),
            needed,
            free,
            total: figure(&first, "nr_hugepages").unwrap_or(0) + (needed - free),
            path: self.pool_of(first, pool, "nr_hugepages"),
        })
    }

    fn pool_of(&self, node: usize, pool: &HugePages, file: &str) -> String {
        format!("{NODES}/node{node}/hugepages/hugepages-{}kB/{file}", pool.size >> 10)
    }
}

impl Display for Nodes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

fn named(nodes: &CpuList) -> String {
    format!("the host's NUMA node{} {nodes}", if nodes.cpus().len() == 1 { "" } else { "s" })
}

/// What the kernel lets this process use, from the text of /proc/self/status.
fn allowed(status: &str) -> Option<CpuList> {
    status.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:")?.trim().parse().ok())
}

/// Bytes of a node's RAM.
fn memory_of(node: usize) -> Option<u64> {
    let text = fs::read_to_string(format!("{NODES}/node{node}/meminfo")).ok()?;
    let line = text.lines().find(|line| line.contains("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().rev().nth(1)?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::super::error::readable;
    use super::*;

    #[test]
    fn only_nodes_that_may_be_used() {
        let allowed = allowed("Cpus_allowed_list:\t0-1\nMems_allowed_list:\t0,2-3\n").unwrap();
        assert_eq!(Nodes::among(&[0, 3], &allowed).unwrap().mask(), [0b1001]);
        assert_eq!(Nodes::among(&[2], &allowed).unwrap().to_string(), "2");
        let said = Nodes::among(&[1], &allowed).unwrap_err().to_string();
        assert!(
            said.starts_with("host-node=1: this process may use memory of the host's NUMA nodes 0,2-3 only"),
            "{said}"
        );
        let high: CpuList = "0,70".parse().unwrap();
        assert_eq!(Nodes::among(&[70, 0], &high).unwrap().mask(), [1, 1 << 6]);
    }

    #[test]
    fn more_than_a_node_has_is_refused() {
        let Some(nodes) = Nodes::new(&[0]).ok().flatten() else { return };
        let said = nodes.require_memory(1 << 50).unwrap_err().to_string();
        assert!(said.starts_with("host-node=0: 1024T of guest memory is more than the "), "{said}");
        nodes.require_memory(1 << 20).unwrap();
        for pool in HugePages::all() {
            let error = nodes.require_huge_pages(&pool, 1 << 40).unwrap_err();
            let place = format!("too few huge pages of {} on the host's NUMA node 0: ", readable(pool.size));
            assert!(error.to_string().starts_with(&place), "{error}");
        }
    }
}
