//! Lists of host CPUs as people write them: `2,3` or `0-3`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

/// CPUs past this have no place in the kernel's usual set.
const MAX_CPU: usize = 1023;

/// CPUs in the order given; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuList(Vec<usize>);

impl CpuList {
    pub fn cpus(&self) -> &[usize] {
        &self.0
    }

    /// The CPU for the `index`-th of many: from the start again when they are used up.
    pub fn round_robin(&self, index: usize) -> usize {
        self.0[index % self.0.len()]
    }
}

impl FromIterator<usize> for CpuList {
    /// # Panics
    /// When there is none.
    fn from_iter<I: IntoIterator<Item = usize>>(cpus: I) -> Self {
        let cpus: Vec<usize> = cpus.into_iter().collect();
        assert!(!cpus.is_empty(), "a list of CPUs has one at least");
        Self(cpus)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuListError {
    #[error("'{0}' is no list of CPUs: write it as 2,3 or 0-3")]
    NotAList(String),
    #[error("CPU {0}: the last one possible is {MAX_CPU}")]
    TooHigh(usize),
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || CpuListError::NotAList(text.to_owned());
        let number = |text: &str| text.parse::<usize>().map_err(|_| wrong());
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            match first.max(last) {
                cpu if cpu > MAX_CPU => return Err(CpuListError::TooHigh(cpu)),
                _ if first > last => return Err(wrong()),
                _ => cpus.extend(first..=last),
            }
        }
        Ok(Self(cpus))
    }
}

/// Runs are written as ranges: `0-2,5`.
impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, run) in self.0.chunk_by(|a, b| a + 1 == *b).enumerate() {
            let separator = if at == 0 { "" } else { "," };
            match run {
                [first, .., last] => write!(f, "{separator}{first}-{last}")?,
                run => write!(f, "{separator}{}", run[0])?,
            }
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for CpuList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        crate::options::from_word(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_ranges() {
        for (text, cpus, shown) in [
            ("3", vec![3], "3"),
            ("2,3", vec![2, 3], "2-3"),
            ("0-3", vec![0, 1, 2, 3], "0-3"),
            ("5,0-1,7", vec![5, 0, 1, 7], "5,0-1,7"),
        ] {
            let list: CpuList = text.parse().unwrap();
            assert_eq!((list.cpus(), list.to_string().as_str()), (&cpus[..], shown), "{text}");
            assert_eq!(list.to_string().parse(), Ok(list));
        }
        let list: CpuList = "4,6".parse().unwrap();
        assert_eq!([0, 1, 2, 3].map(|index| list.round_robin(index)), [4, 6, 4, 6]);
        for text in ["", "x", "1,", "3-1", "-1", "1-", "0-1-2", "1 2", "99999999999999999999"] {
            assert_eq!(text.parse::<CpuList>(), Err(CpuListError::NotAList(text.into())), "{text}");
        }
        assert_eq!("0-99999999999".parse::<CpuList>(), Err(CpuListError::TooHigh(99_999_999_999)));
    }
}
