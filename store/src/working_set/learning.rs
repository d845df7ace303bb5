//! What a working set learns from restores. Pure: old set and what was seen in, new set out.
//!
//! A page's *weight* is the share of restores that touched it, the late ones counting more. Only a
//! restore without installs shows all touches; one with installs shows the pages that had to be
//! faulted in, and says nothing about those that were there. So weights fall only after a
//! *complete* observation, and an installed page never counts as touched by itself.

use std::collections::BTreeMap;

use super::neighbours::neighbours;
use crate::{PAGE_SIZE, Profile, RecordedPage, Touch, WEIGHT_ONE, WorkingSet, WorkingSetContent};

/// A page whose weight falls below this leaves the set. From a weight of 1 that takes eight complete
/// observations without a touch, from that of a page that was missed once three.
pub const DROP_BELOW: f32 = 0.125;
/// The least that one restore counts for: the last eight make nine tenths of a weight.
const LEAST_SHARE: f32 = 0.25;
/// What a complete observation counts for when the set did not fit: the inputs are others now.
const MISFIT_SHARE: f32 = 0.5;
/// A set fits badly when more than this part of what a restore touches is not in it.
pub const MISFIT_MISSES: f64 = 0.03;
/// A set is worth publishing when this part of its pages came or went: half of a misfit.
const PUBLISH_CHANGE: f64 = MISFIT_MISSES / 2.0;
/// Weights are stored in steps of this part of [`WEIGHT_ONE`]: pages of different weight are runs of
/// their own, and long runs install faster.
const WEIGHT_STEPS: f32 = 16.0;
/// Zero pages have no bytes, only runs.
const MAX_ZERO_PAGES: usize = 1 << 20;

/// File number and page.
pub type PageKey = (u32, u64);

/// What is known of a page.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearnedPage {
    /// Microseconds from the start of a restore to the first touch, in the last complete observation
    /// that had one.
    pub first_touch_us: u32,
    /// Share of restores that touched it, over 0, at most 1.
    pub weight: f32,
    /// It is zeros in the snapshot, and costs no bytes.
    pub zero: bool,
    /// It was seen to be touched since the set was read from the store.
    pub touched: bool,
}

/// What a restore showed.
#[derive(Clone, Debug, Default)]
pub struct Observation {
    /// Faults and reads in order of time, one for each page, without those after the restore settled.
    pub touches: Vec<Touch>,
    /// Nothing was installed ahead: what is not here was not touched.
    pub complete: bool,
}

/// A working set in learning.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LearnedSet {
    pages: BTreeMap<PageKey, LearnedPage>,
    restores: u32,
}

/// How well a set did in a restore.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit {
    /// Part of what the restore touched that the set did not have; of an estimate of it, where the
    /// observation is not complete.
    pub missed: f64,
}

impl Fit {
    /// Whether the set has less than half of it: another use of the snapshot, or somebody who reads all of
    /// guest memory. Its misses are not merged; a sample shows what restores really touch.
    pub fn is_foreign(&self) -> bool {
        self.missed > 0.5
    }

    /// Whether the set is for other inputs than this one.
    pub fn is_bad(&self) -> bool {
        self.missed > MISFIT_MISSES
    }
}

impl LearnedSet {
    /// A set as it was stored.
    pub fn new(pages: impl IntoIterator<Item = (PageKey, LearnedPage)>, restores: u32) -> Self {
        Self { pages: pages.into_iter().collect(), restores }
    }

    /// What a stored set knows.
    pub fn of(set: &WorkingSet) -> Self {
        let data = set.data_runs().iter().map(|run| (run, false));
        let runs = data.chain(set.zero_runs().iter().map(|run| (run, true)));
        // The neighbours follow from the others.
        let runs = runs.filter(|(run, _)| run.was_touched());
        let pages = runs.flat_map(|(run, zero)| {
            let page = LearnedPage {
                first_touch_us: run.first_touch_us,
                weight: f32::from(run.weight) / f32::from(WEIGHT_ONE),
                zero,
                touched: false,
            };
            let numbers = run.first_page..run.first_page + u64::from(run.pages);
            numbers.map(move |number| ((run.file, number), page))
        });
        Self::new(pages, set.restores())
    }

    /// The same with its [`neighbours`], to be stored; of these no more than leave `limit_bytes` of pages.
    pub fn content(&self, profile: &Profile, limit_bytes: u64) -> WorkingSetContent {
        let weight = |weight: f32| {
            let steps =
                (weight * WEIGHT_STEPS).round().clamp(DROP_BELOW * WEIGHT_STEPS, WEIGHT_STEPS);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 0 and WEIGHT_ONE"
            )]
            let fixed = (steps / WEIGHT_STEPS * f32::from(WEIGHT_ONE)) as u16;
            fixed
        };
        let page = |((file, page), learned): (PageKey, LearnedPage)| RecordedPage {
            file,
            page,
            first_touch_us: learned.first_touch_us,
            weight: weight(learned.weight),
        };
        let most = most_pages(limit_bytes).saturating_sub(self.data_pages());
        let neighbours = neighbours(&self.pages, most).into_iter();
        let neighbours = neighbours.map(|((file, page), first_touch_us)| RecordedPage {
            file,
            page,
            first_touch_us,
            weight: 0,
        });
        WorkingSetContent {
            profile: profile.clone(),
            restores: self.restores,
            pages: self.in_order().into_iter().map(page).chain(neighbours).collect(),
        }
    }

    fn data_pages(&self) -> usize {
        self.pages.values().filter(|page| !page.zero).count()
    }

    /// How many complete observations it was learned from.
    pub fn restores(&self) -> u32 {
        self.restores
    }

    /// How many pages it has.
    pub fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// One of its pages.
    pub fn page(&self, key: PageKey) -> Option<&LearnedPage> {
        self.pages.get(&key)
    }

    /// All pages in first-touch order.
    pub fn in_order(&self) -> Vec<(PageKey, LearnedPage)> {
        let mut pages: Vec<_> = self.pages.iter().map(|(key, page)| (*key, *page)).collect();
        pages.sort_by_key(|(key, page)| (page.first_touch_us, *key));
        pages
    }

    /// How well it did in a restore of which this was seen.
    pub fn fit(&self, seen: &Observation) -> Fit {
        // Where they were not installed, only we know that they would have been.
        let neighbours =
            if seen.complete { neighbours(&self.pages, usize::MAX) } else { BTreeMap::new() };
        let has = |touch: &Touch| {
            let key = (touch.file, touch.page);
            self.pages.contains_key(&key) || neighbours.contains_key(&key)
        };
        let missed = seen.touches.iter().filter(|touch| !has(touch)).count();
        let touched = match seen.complete {
            true => seen.touches.len() as f64,
            // What was installed and touched cannot be seen: as much as the weights expect.
            false => {
                self.pages.values().map(|page| f64::from(page.weight)).sum::<f64>() + missed as f64
            }
        };
        Fit { missed: missed as f64 / touched.max(1.0) }
    }

    /// The set after a restore; `is_zero` says of a page whether it is zeros in the snapshot, `None` if
    /// there is no such page. At most `limit_bytes` of pages that have bytes.
    pub fn learn(
        &self,
        seen: &Observation,
        is_zero: impl Fn(PageKey) -> Option<bool>,
        limit_bytes: u64,
    ) -> Self {
        let mut next = self.clone();
        let mut share = LEAST_SHARE.max(1.0 / (self.restores as f32 + 1.0));
        if seen.complete {
            if self.restores > 0 && self.fit(seen).is_bad() {
                share = share.max(MISFIT_SHARE);
            }
            next.restores = self.restores.saturating_add(1);
            next.decay(seen, share);
        }
        for touch in &seen.touches {
            let key = (touch.file, touch.page);
            let Some(zero) = is_zero(key) else { continue };
            let at_us = u32::try_from(touch.at_us).unwrap_or(u32::MAX);
            let page = next.pages.entry(key).or_insert(LearnedPage {
                first_touch_us: at_us,
                weight: 0.0,
                zero,
                touched: true,
            });
            page.touched = true;
            page.weight += share * (1.0 - page.weight);
            if seen.complete {
                page.first_touch_us = at_us;
            }
        }
        next.pages.retain(|_, page| page.weight >= DROP_BELOW);
        next.bound(limit_bytes);
        next
    }

    /// All pages lose; those that were touched get it back with interest. A file of which nothing was
    /// read tells nothing: its pages may be in the kernel's page cache.
    fn decay(&mut self, seen: &Observation, share: f32) {
        let touched: std::collections::HashSet<PageKey> =
            seen.touches.iter().map(|touch| (touch.file, touch.page)).collect();
        let files: std::collections::HashSet<u32> =
            seen.touches.iter().map(|touch| touch.file).collect();
        for (key, page) in &mut self.pages {
            if files.contains(&key.0) && !touched.contains(key) {
                page.weight -= share * page.weight;
            }
        }
    }

    /// Keeps what is touched most often, and of that the earliest.
    fn bound(&mut self, limit_bytes: u64) {
        for (zero, most) in [(false, most_pages(limit_bytes)), (true, MAX_ZERO_PAGES)] {
            let of_kind = self.pages.iter().filter(|(_, page)| page.zero == zero);
            let mut pages: Vec<_> = of_kind.map(|(key, page)| (*key, *page)).collect();
            if pages.len() <= most {
                continue;
            }
            pages.sort_by(|(one, a), (other, b)| {
                let order = b.weight.total_cmp(&a.weight);
                order.then((a.first_touch_us, one).cmp(&(b.first_touch_us, other)))
            });
            for (key, _) in &pages[most..] {
                self.pages.remove(key);
            }
        }
    }

    /// `self` came from `base`, and so did `theirs`, which another node published meanwhile. Every page
    /// of theirs stays, and every page that we saw touched; what only we saw untouched loses
    /// weight. Only `limit_bytes` can take pages away.
    pub fn merge(&self, base: &Self, theirs: &Self, limit_bytes: u64) -> Self {
        let mut merged = theirs.clone();
        let own = self.restores.saturating_sub(base.restores);
        merged.restores = theirs.restores.saturating_add(own);
        let weight_in = |set: &Self, key| set.pages.get(key).map_or(0.0, |page| page.weight);
        for (key, page) in &mut merged.pages {
            let (ours, before) = (self.pages.get(key), weight_in(base, key));
            match ours {
                Some(ours) if ours.touched => {
                    page.weight = page.weight.max(ours.weight);
                    page.touched = true;
                }
                _ => {
                    let lost = (before - ours.map_or(0.0, |page| page.weight)).max(0.0);
                    page.weight = (page.weight - lost).max(DROP_BELOW);
                }
            }
        }
        for (key, page) in &self.pages {
            // What they dropped and we know nothing new of stays dropped.
            if page.touched || !base.pages.contains_key(key) {
                merged.pages.entry(*key).or_insert(*page);
            }
        }
        merged.bound(limit_bytes);
        merged
    }

    /// Whether it differs so much from what it was `before` a restore that the next should be looked at soon:
    /// pages come, go, or are on their way out.
    pub fn has_moved(&self, before: &Self) -> bool {
        let weight_in = |set: &Self, key| set.pages.get(key).map_or(0.0, |page| page.weight);
        let both = self.pages.keys().chain(before.pages.keys());
        let keys: std::collections::BTreeSet<_> = both.collect();
        let moved: f64 = keys
            .iter()
            .map(|key| f64::from((weight_in(self, key) - weight_in(before, key)).abs()))
            .sum();
        moved > PUBLISH_CHANGE * before.pages.len() as f64
    }

    /// Whether it differs from what is `published` by enough to be worth an object of its own.
    pub fn is_worth_publishing(&self, published: &Self) -> bool {
        let came = self.pages.keys().filter(|key| !published.pages.contains_key(*key)).count();
        let went = published.pages.keys().filter(|key| !self.pages.contains_key(*key)).count();
        (came + went) as f64 > PUBLISH_CHANGE * published.pages.len() as f64
    }
}

fn most_pages(limit_bytes: u64) -> usize {
    usize::try_from(limit_bytes / PAGE_SIZE as u64).unwrap_or(usize::MAX)
}

#[cfg(test)]
#[path = "learning/tests.rs"]
mod tests;
