//! The order of one unit's tasks (SAM-5, task attributes), among all queues.
//!
//! ```text
//!   a task:   arrives --gate open--> runs --leave--> gone
//!                `--gate closed--> in line --all before it are gone--> runs
//! ```
//!
//! A task that wants to be alone closes the gate: it waits for those that run, and those that come later wait for it. The
//! gate opens when nobody is in line. While it is open, to pass it costs one addition, and so does leaving.
//!
//! Invariants: a task that is alone runs alone, but for those that go ahead of all (HEAD OF QUEUE); the line is only
//! looked at under its lock; whoever brings the count to zero at a closed gate looks at the line.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a task wants of those around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// SIMPLE.
    Any,
    /// ORDERED: after those before it and before those after it. A task that no other may come between is alone as well.
    Alone,
    /// HEAD OF QUEUE.
    Ahead,
}

/// A task by the head of its request and its queue.
pub(crate) type Name = (u16, u16);

#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// Tasks that run, times two; one more while the gate is closed.
    word: AtomicUsize,
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    waiting: VecDeque<(Name, Order)>,
    /// The one that runs is to be alone.
    alone: bool,
}

const CLOSED: usize = 1;
const ONE: usize = 2;

/// The tasks that may run by what was done.
pub(crate) type Started = Vec<Name>;

impl Gate {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The task `name` arrives. If it is not among those that are started, it waits.
    pub(crate) fn arrive(&self, name: Name, order: Order) -> Result<(), Started> {
        match order {
            Order::Ahead => {
                self.word.fetch_add(ONE, Ordering::AcqRel);
                return Ok(());
            }
            Order::Any => {
                if self.word.fetch_add(ONE, Ordering::AcqRel) & CLOSED == 0 {
                    return Ok(());
                }
                self.word.fetch_sub(ONE, Ordering::AcqRel);
            }
            Order::Alone => {}
        }
        let mut line = self.line();
        line.waiting.push_back((name, order));
        self.word.fetch_or(CLOSED, Ordering::AcqRel);
        Err(self.advance(&mut line))
    }

    /// A task that ran is gone.
    pub(crate) fn leave(&self) -> Started {
        if self.word.fetch_sub(ONE, Ordering::AcqRel) != ONE | CLOSED {
            return Started::new();
        }
        let mut line = self.line();
        self.advance(&mut line)
    }

    /// A task that may be in line gives up. `None`: it is not in line.
    pub(crate) fn withdraw(&self, name: Name) -> Option<Started> {
        let mut line = self.line();
        let at = line.waiting.iter().position(|(waiting, _)| *waiting == name)?;
        line.waiting.remove(at);
        Some(self.advance(&mut line))
    }

    fn advance(&self, line: &mut Line) -> Started {
        let mut started = Started::new();
        // The one that was alone has left if nobody runs.
        let idle = || self.word.load(Ordering::Acquire) == CLOSED;
        if line.alone && !idle() {
            return started;
        }
        line.alone = false;
        while let Some((name, order)) = line.waiting.front().copied() {
            let alone = order == Order::Alone;
            if alone && !idle() {
                return started;
            }
            line.waiting.pop_front();
            line.alone = alone;
            self.word.fetch_add(ONE, Ordering::AcqRel);
            started.push(name);
            if alone {
                return started;
            }
        }
        self.word.fetch_and(!CLOSED, Ordering::AcqRel);
        started
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(head: u16) -> Name {
        (0, head)
    }

    #[test]
    fn an_ordered_task_waits_for_those_before_it_and_those_after_wait_for_it() {
        let gate = Gate::default();
        assert_eq!(gate.arrive(name(1), Order::Any), Ok(()));
        assert_eq!(gate.arrive(name(2), Order::Any), Ok(()));
        assert_eq!(gate.arrive(name(3), Order::Alone), Err(vec![]));
        assert_eq!(gate.arrive(name(4), Order::Any), Err(vec![]));
        assert_eq!(gate.arrive(name(5), Order::Alone), Err(vec![]));
        assert_eq!(gate.arrive(name(6), Order::Any), Err(vec![]));
        assert_eq!(gate.leave(), vec![]);
        assert_eq!(gate.leave(), vec![name(3)]);
        assert_eq!(gate.leave(), vec![name(4)]);
        assert_eq!(gate.leave(), vec![name(5)]);
        assert_eq!(gate.leave(), vec![name(6)]);
        // The gate is open again.
        assert_eq!(gate.arrive(name(7), Order::Any), Ok(()));
        assert_eq!(gate.leave(), vec![]);
        assert_eq!(gate.leave(), vec![]);
        assert_eq!(gate.arrive(name(8), Order::Alone), Err(vec![name(8)]));
    }

    #[test]
    fn who_gives_up_does_not_hold_up_others() {
        let gate = Gate::default();
        assert_eq!(gate.arrive(name(1), Order::Any), Ok(()));
        assert_eq!(gate.arrive(name(2), Order::Alone), Err(vec![]));
        assert_eq!(gate.arrive(name(3), Order::Any), Err(vec![]));
        assert_eq!(gate.withdraw(name(9)), None);
        assert_eq!(gate.withdraw(name(2)), Some(vec![name(3)]));
        assert_eq!(gate.leave(), vec![]);
        assert_eq!(gate.leave(), vec![]);
    }

    #[test]
    fn one_that_goes_ahead_waits_for_nobody() {
        let gate = Gate::default();
        assert_eq!(gate.arrive(name(1), Order::Alone), Err(vec![name(1)]));
        assert_eq!(gate.arrive(name(2), Order::Ahead), Ok(()));
        assert_eq!(gate.arrive(name(3), Order::Any), Err(vec![]));
        assert_eq!(gate.leave(), vec![]);
        assert_eq!(gate.leave(), vec![name(3)]);
    }

    #[test]
    fn under_many_threads_one_that_is_alone_is_alone_and_nobody_is_forgotten() {
        use std::sync::Arc;
        use std::sync::atomic::AtomicUsize;
        let gate = Arc::new(Gate::default());
        let running = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
        let started: Arc<Vec<AtomicUsize>> = Arc::new((0..4).map(|_| AtomicUsize::new(0)).collect());
        let threads: Vec<_> = (0..4u16)
            .map(|thread| {
                let (gate, running, started) = (gate.clone(), running.clone(), started.clone());
                std::thread::spawn(move || {
                    let tell = |names: Started| {
                        for (queue, _) in names {
                            started[usize::from(queue)].fetch_add(1, Ordering::SeqCst);
                        }
                    };
                    for turn in 0..2000u16 {
                        let alone = (turn + thread) % 7 == 0;
                        let order = if alone { Order::Alone } else { Order::Any };
                        if let Err(names) = gate.arrive((thread, turn), order) {
                            tell(names);
                            while started[usize::from(thread)].load(Ordering::SeqCst) == 0 {
                                std::thread::yield_now();
                            }
                            started[usize::from(thread)].fetch_sub(1, Ordering::SeqCst);
                        }
                        let (all, lone) = &*running;
                        all.fetch_add(1, Ordering::SeqCst);
                        lone.fetch_add(usize::from(alone), Ordering::SeqCst);
                        if lone.load(Ordering::SeqCst) != 0 && alone {
                            assert_eq!(all.load(Ordering::SeqCst), 1);
                        }
                        all.fetch_sub(1, Ordering::SeqCst);
                        lone.fetch_sub(usize::from(alone), Ordering::SeqCst);
                        tell(gate.leave());
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}
