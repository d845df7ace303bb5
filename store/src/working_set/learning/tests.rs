//! Properties of learning, of merging, and of many nodes that publish to one sequence.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const NO_LIMIT: u64 = 1 << 40;

/// Every fifth page is zeros.
fn is_zero((_, page): PageKey) -> Option<bool> {
    Some(page.is_multiple_of(5))
}

/// Touches of `pages` in this order, a microsecond apart.
fn seen(pages: impl IntoIterator<Item = u64>, complete: bool) -> Observation {
    let pages = pages.into_iter().collect::<Vec<_>>().into_iter().enumerate();
    let touch = |(at, page)| Touch { file: 0, page, at_us: at as u64 };
    Observation { touches: pages.map(touch).collect(), complete }
}

fn pages_of(set: &LearnedSet) -> BTreeSet<u64> {
    set.in_order().iter().map(|((_, page), _)| *page).collect()
}

fn some_pages() -> impl Strategy<Value = BTreeSet<u64>> {
    prop::collection::btree_set(0..200u64, 0..60)
}

proptest! {
    #[test]
    fn nothing_grows_without_touches_and_the_bound_holds(
        restores in prop::collection::vec((some_pages(), any::<bool>()), 1..30),
        limit_pages in 1..40u64,
    ) {
        let mut set = LearnedSet::default();
        for (pages, complete) in restores {
            let before = pages_of(&set);
            set = set.learn(&seen(pages.clone(), complete), is_zero, limit_pages * 4096);
            let after = pages_of(&set);
            prop_assert!(after.is_subset(&before.union(&pages).copied().collect()));
            let data = set.in_order().iter().filter(|(_, page)| !page.zero).count();
            prop_assert!(data as u64 <= limit_pages);
            for (_, page) in set.in_order() {
                prop_assert!((DROP_BELOW..=1.0).contains(&page.weight));
            }
        }
    }

    #[test]
    fn what_is_always_touched_stays_and_what_is_no_longer_touched_leaves(
        always in some_pages(), once in some_pages(), noise in prop::collection::vec(some_pages(), 12),
    ) {
        let first = always.union(&once).copied();
        let mut set = LearnedSet::default().learn(&seen(first, true), is_zero, NO_LIMIT);
        for pages in &noise {
            let now: BTreeSet<u64> = always.union(pages).copied().collect();
            // A restore with installs in between shows only what was missed.
            let missed: Vec<u64> = now.difference(&pages_of(&set)).copied().collect();
            set = set.learn(&seen(missed, false), is_zero, NO_LIMIT);
            set = set.learn(&seen(now, true), is_zero, NO_LIMIT);
            prop_assert!(always.is_subset(&pages_of(&set)));
        }
        if !always.is_empty() {
            for _ in 0..12 {
                set = set.learn(&seen(always.clone(), true), is_zero, NO_LIMIT);
            }
            prop_assert_eq!(pages_of(&set), always, "it converges to what is touched");
        }
    }

    #[test]
    fn the_order_is_that_of_the_last_complete_first_touches(
        pages in prop::collection::vec(0..500u64, 1..60).prop_shuffle(), missed in some_pages(),
    ) {
        let mut distinct = Vec::new();
        pages.into_iter().for_each(|page| if !distinct.contains(&page) { distinct.push(page) });
        let mut set = LearnedSet::default().learn(&seen(missed, true), is_zero, NO_LIMIT);
        set = set.learn(&seen(distinct.clone(), true), is_zero, NO_LIMIT);
        let order: Vec<u64> = set
            .in_order()
            .into_iter()
            .map(|((_, page), _)| page)
            .filter(|page| distinct.contains(page))
            .collect();
        prop_assert_eq!(order, distinct);
    }

    #[test]
    fn a_restore_with_installs_takes_no_weight(first in some_pages(), missed in some_pages()) {
        let set = LearnedSet::default().learn(&seen(first, true), is_zero, NO_LIMIT);
        let after = set.learn(&seen(missed.clone(), false), is_zero, NO_LIMIT);
        prop_assert_eq!(after.restores(), set.restores());
        for (key, page) in set.in_order() {
            prop_assert!(after.page(key).is_some_and(|now| now.weight >= page.weight));
        }
        prop_assert!(missed.iter().all(|page| after.page((0, *page)).is_some()));
    }

    #[test]
    fn a_merge_loses_no_page_of_theirs_and_none_that_we_saw_touched(
        start in some_pages(), ours in prop::collection::vec((some_pages(), any::<bool>()), 0..12),
        theirs in prop::collection::vec((some_pages(), any::<bool>()), 0..12),
    ) {
        let base = LearnedSet::default().learn(&seen(start, true), is_zero, NO_LIMIT).stored();
        let after = |restores: Vec<(BTreeSet<u64>, bool)>| {
            let learn = |set: LearnedSet, (pages, complete)| {
                set.learn(&seen(pages, complete), is_zero, NO_LIMIT)
            };
            restores.into_iter().fold(base.clone(), learn)
        };
        let (ours, theirs) = (after(ours), after(theirs).stored());
        let merged = ours.merge(&base, &theirs, NO_LIMIT);
        for (key, page) in theirs.in_order() {
            let kept = merged.page(key);
            prop_assert!(kept.is_some_and(|kept| kept.weight >= DROP_BELOW), "{key:?} {page:?}");
        }
        for (key, page) in ours.in_order() {
            if page.touched {
                prop_assert!(merged.page(key).is_some_and(|kept| kept.weight >= page.weight));
            }
        }
        prop_assert_eq!(base.merge(&base, &theirs, NO_LIMIT), theirs.clone(), "nothing new");
        prop_assert_eq!(theirs.restores() + ours.restores() - base.restores(), merged.restores());
    }

    /// Nodes that see different pages, and publish in any order to one create-only sequence.
    #[test]
    fn many_nodes_end_with_what_any_of_them_touches(
        own in prop::collection::vec(some_pages(), 2..6),
        steps in prop::collection::vec((0..6usize, 0..4u8), 20..120),
    ) {
        let mut store: Vec<LearnedSet> = Vec::new();
        let mut nodes: Vec<SimulatedNode> =
            own.iter().map(|pages| SimulatedNode::new(pages.clone())).collect();
        let (mut published, mut collided) = (0, 0);
        let count = nodes.len();
        for (node, act) in steps {
            let node = &mut nodes[node % count];
            match act {
                0 => node.restore(true),
                1 => node.restore(false),
                // Reads the newest, is overtaken or not, and creates.
                _ => match node.publish(&mut store) {
                    Ok(()) => published += 1,
                    Err(()) => collided += 1,
                },
            }
        }
        // A node's samples may have let go of what only another touches. That one misses it with its
        // next set and puts it back; from then on no publication may lose it.
        for _ in 0..2 {
            for node in &mut nodes {
                node.restore(false);
                while node.publish(&mut store).is_err() {}
            }
        }
        prop_assert!(published + collided <= 120);
        let newest = pages_of(store.last().expect("each node has published"));
        for pages in &own {
            prop_assert!(pages.is_subset(&newest), "{:?}", pages.difference(&newest));
        }
    }
}

impl LearnedSet {
    /// As it comes back from the store.
    fn stored(&self) -> Self {
        let pages = self.pages.iter();
        let stored = pages.map(|(key, page)| (*key, LearnedPage { touched: false, ..*page }));
        Self::new(stored, self.restores)
    }
}

/// A node as `reapd` is one: a set from the store, what it learned since, and a restore's touches.
struct SimulatedNode {
    touches: BTreeSet<u64>,
    sequence: usize,
    base: LearnedSet,
    learned: LearnedSet,
}

impl SimulatedNode {
    fn new(touches: BTreeSet<u64>) -> Self {
        let (base, learned) = Default::default();
        Self { touches, sequence: 0, base, learned }
    }

    fn restore(&mut self, complete: bool) {
        let installed = pages_of(&self.base);
        let visible = self.touches.iter().filter(|page| complete || !installed.contains(*page));
        let seen = seen(visible.copied().collect::<Vec<_>>(), complete);
        self.learned = self.learned.learn(&seen, is_zero, NO_LIMIT);
    }

    /// One try: what is newest when it looks is merged, and a create that finds the sequence taken
    /// fails. The next try sees more.
    fn publish(&mut self, store: &mut Vec<LearnedSet>) -> Result<(), ()> {
        if self.sequence < store.len() {
            let theirs = store.last().expect("not empty").clone();
            self.learned = self.learned.merge(&self.base, &theirs, NO_LIMIT);
            self.base = theirs;
            self.sequence = store.len();
            return Err(());
        }
        store.push(self.learned.stored());
        self.sequence = store.len();
        self.base = self.learned.stored();
        self.learned = self.base.clone();
        Ok(())
    }
}

#[test]
fn a_misfit_is_a_miss_share_over_three_in_a_hundred() {
    let set = LearnedSet::default().learn(&seen(0..1000, true), is_zero, NO_LIMIT);
    assert!(!set.fit(&seen(0..1030, true)).is_bad());
    assert!(set.fit(&seen(0..1032, true)).is_bad());
    assert!(!set.fit(&seen(1000..1030, false)).is_bad());
    assert!(set.fit(&seen(1000..1032, false)).is_bad());
    assert!(!set.fit(&seen(0..100, false)).is_bad(), "late pages are in the set");
    assert!(!set.fit(&seen(1000..2000, false)).is_foreign());
    assert!(set.fit(&seen(1000..2001, false)).is_foreign());
}

#[test]
fn small_changes_are_not_published_and_sums_of_them_are() {
    let set = LearnedSet::default().learn(&seen(0..1000, true), is_zero, NO_LIMIT);
    assert!(set.is_worth_publishing(&LearnedSet::default()));
    let mut now = set.clone();
    for step in 0..3 {
        assert!(!now.is_worth_publishing(&set), "step {step}");
        let from = 1000 + 7 * step;
        now = now.learn(&seen(from..from + 7, false), is_zero, NO_LIMIT);
    }
    assert!(now.is_worth_publishing(&set));
}

/// A file that is read through the kernel's page cache shows nothing when it is cached.
#[test]
fn pages_of_a_file_that_nobody_read_keep_their_weight() {
    let mut both = seen(0..10, true);
    both.touches.push(Touch { file: 2, page: 7, at_us: 1 });
    let mut set = LearnedSet::default().learn(&both, is_zero, NO_LIMIT);
    for _ in 0..20 {
        set = set.learn(&seen(0..10, true), is_zero, NO_LIMIT);
    }
    assert!(set.page((2, 7)).is_some_and(|page| page.weight == 1.0));
    let mut other = seen(0..10, true);
    other.touches.push(Touch { file: 2, page: 8, at_us: 1 });
    for _ in 0..20 {
        set = set.learn(&other, is_zero, NO_LIMIT);
    }
    assert!(set.page((2, 7)).is_none());
}

#[test]
fn neighbours_are_stored_without_weight_and_are_not_learned_from() {
    let profile = Profile::default();
    let touched: Vec<u64> = (0..300).filter(|page| page % 3 != 0).collect();
    let set = LearnedSet::default().learn(&seen(touched.clone(), true), is_zero, NO_LIMIT);
    let content = set.content(&profile, NO_LIMIT);
    let others: Vec<_> = content.pages.iter().filter(|page| page.weight == 0).collect();
    assert_eq!(content.pages.len() - others.len(), touched.len());
    assert!(others.len() > 70 && others.iter().all(|page| page.page % 3 == 0), "{others:?}");

    let data = set.in_order().iter().filter(|(_, page)| !page.zero).count();
    let limited = set.content(&profile, (data as u64 + 5) * 4096);
    assert_eq!(limited.pages.len(), touched.len() + 5, "what is left of the limit");
    let limited = set.content(&profile, 4096);
    assert_eq!(limited.pages.len(), touched.len(), "nothing is left");

    // A sample touches one of them: it would have been there.
    let sample = seen(touched.iter().copied().chain([150]), true);
    assert!(set.fit(&sample).missed.abs() < 1e-9);
    let far = seen(touched.iter().copied().chain([1000]), true);
    assert!(set.fit(&far).missed > 0.0);
}
