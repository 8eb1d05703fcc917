//! How long to look for work before sleeping: as long as it pays, and not at all on an idle disk.
//!
//! ```text
//!   work came within the window: keep it | after it, within the limit: longer | later than the limit: half, then none
//! ```

use std::time::Duration;

/// The first window that is worth its two looks at the clock.
const FIRST: Duration = Duration::from_micros(4);

/// One queue's window. A limit of zero turns polling off.
#[derive(Debug)]
pub(crate) struct Polling {
    limit: Duration,
    window: Duration,
}

impl Polling {
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, window: Duration::ZERO }
    }

    pub(crate) fn is_on(&self) -> bool {
        !self.limit.is_zero()
    }

    /// How long to look before sleeping now.
    pub(crate) fn window(&self) -> Duration {
        self.window
    }

    /// Work came after `idle`, looked for or slept for.
    pub(crate) fn came_after(&mut self, idle: Duration) {
        if idle <= self.window {
            return;
        }
        self.window = if idle <= self.limit {
            (2 * self.window).max(FIRST).min(self.limit)
        } else if self.window > FIRST {
            self.window / 2
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn grows_while_it_pays_up_to_the_limit() {
        let mut polling = Polling::new(50 * US);
        let mut windows = Vec::new();
        for _ in 0..6 {
            polling.came_after(40 * US);
            windows.push(polling.window().as_micros());
        }
        assert_eq!(windows, [4, 8, 16, 32, 50, 50]);
    }

    #[test]
    fn ends_soon_on_an_idle_disk() {
        let mut polling = Polling::new(100 * US);
        (0..10).for_each(|_| polling.came_after(90 * US));
        assert_eq!(polling.window(), 100 * US);
        let turns = (0..).take_while(|_| {
            polling.came_after(Duration::from_secs(1));
            !polling.window().is_zero()
        });
        assert!(turns.count() <= 6);
        polling.came_after(Duration::from_secs(1));
        assert!(polling.window().is_zero());
    }

    #[test]
    fn off_is_off() {
        let mut polling = Polling::new(Duration::ZERO);
        polling.came_after(US);
        assert!(!polling.is_on() && polling.window().is_zero());
    }
}
