//! Where guest memory lies: regions, guest pages and pages of the memory file. Pure arithmetic.
//!
//! A *guest page* here is a number, counted through the regions in address order; it indexes the
//! bitmaps of a VM. It is 4 KiB or 2 MiB long, while pages of the memory file are always 4 KiB.

use std::ops::Range;

use reap_store::PAGE_SIZE;

/// Bytes in a page of the memory file.
pub(crate) const FILE_PAGE_BYTES: u64 = PAGE_SIZE as u64;

/// The size of a guest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageSize {
    /// 4 KiB.
    Base,
    /// 2 MiB, from the VMM's hugetlb pool.
    Huge,
}

impl PageSize {
    /// In bytes.
    pub(crate) const fn bytes(self) -> u64 {
        match self {
            Self::Base => 4 << 10,
            Self::Huge => 2 << 20,
        }
    }

    /// In pages of the memory file.
    pub(crate) const fn file_pages(self) -> u64 {
        self.bytes() / FILE_PAGE_BYTES
    }
}

/// Contiguous guest memory: host address <-> memory-file offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// Where it is mapped in the VMM.
    pub(crate) address: u64,
    /// Its length.
    pub(crate) bytes: u64,
    /// Where it begins in the memory file.
    pub(crate) file_offset: u64,
}

impl Region {
    fn end(&self) -> u64 {
        self.address + self.bytes
    }
}

/// A run of guest pages that a run of file pages covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Overlap {
    /// The guest pages; contiguous in guest memory.
    pub(crate) pages: Range<u64>,
    /// How many pages of the file run lie before the first of them.
    pub(crate) skipped: u64,
}

struct Placed {
    region: Region,
    first_page: u64,
}

/// The regions of one VM. Made only from regions that keep the rules of the handshake: aligned,
/// without overlap in addresses or file offsets, without overflow.
pub(crate) struct Layout {
    page_size: PageSize,
    /// In address order.
    placed: Vec<Placed>,
    /// Positions in `placed`, in file order.
    by_offset: Vec<usize>,
    page_count: u64,
}

impl Layout {
    /// `regions` in any order.
    pub(crate) fn new(page_size: PageSize, mut regions: Vec<Region>) -> Self {
        regions.sort_unstable_by_key(|region| region.address);
        let mut page_count = 0;
        let mut placed = Vec::with_capacity(regions.len());
        for region in regions {
            placed.push(Placed { region, first_page: page_count });
            page_count += region.bytes / page_size.bytes();
        }
        let mut by_offset: Vec<usize> = (0..placed.len()).collect();
        by_offset.sort_unstable_by_key(|at| placed[*at].region.file_offset);
        Self { page_size, placed, by_offset, page_count }
    }

    /// The size of its guest pages.
    pub(crate) fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// How many guest pages there are.
    pub(crate) fn page_count(&self) -> u64 {
        self.page_count
    }

    /// The regions, in address order.
    pub(crate) fn regions(&self) -> impl Iterator<Item = Region> {
        self.placed.iter().map(|placed| placed.region)
    }

    /// The guest page at `address`; `None` outside all regions.
    pub(crate) fn page_at(&self, address: u64) -> Option<u64> {
        let after = self.placed.partition_point(|placed| placed.region.address <= address);
        let Placed { region, first_page } = self.placed[..after].last()?;
        (address < region.end())
            .then(|| first_page + (address - region.address) / self.page_size.bytes())
    }

    /// The guest pages that lie wholly in the addresses `start..end`, a run for each region.
    pub(crate) fn pages_within(&self, start: u64, end: u64) -> impl Iterator<Item = Range<u64>> {
        let size = self.page_size.bytes();
        self.placed.iter().filter_map(move |Placed { region, first_page }| {
            let from = start.clamp(region.address, region.end()) - region.address;
            let to = end.clamp(region.address, region.end()) - region.address;
            let pages = first_page + from.div_ceil(size)..first_page + to / size;
            (!pages.is_empty()).then_some(pages)
        })
    }

    /// The host address of a guest page.
    pub(crate) fn address(&self, page: u64) -> u64 {
        let Placed { region, first_page } = self.placed_of(page);
        region.address + (page - first_page) * self.page_size.bytes()
    }

    /// The file page with which a guest page begins.
    pub(crate) fn file_page(&self, page: u64) -> u64 {
        let Placed { region, first_page } = self.placed_of(page);
        region.file_offset / FILE_PAGE_BYTES + (page - first_page) * self.page_size.file_pages()
    }

    /// The end (exclusive) of the guest pages that are contiguous with `page`, in memory and file.
    pub(crate) fn region_end(&self, page: u64) -> u64 {
        let Placed { region, first_page } = self.placed_of(page);
        first_page + region.bytes / self.page_size.bytes()
    }

    /// The guest pages that `pages` file pages from `first` on touch: one run for each region that
    /// they meet, none for the gaps. With 2 MiB pages the ends may be covered in part only.
    pub(crate) fn overlaps(&self, first: u64, pages: u64) -> impl Iterator<Item = Overlap> {
        let unit = self.page_size.file_pages();
        let end = first.saturating_add(pages);
        self.by_offset.iter().filter_map(move |at| {
            let Placed { region, first_page } = &self.placed[*at];
            let start = region.file_offset / FILE_PAGE_BYTES;
            let from = first.max(start);
            let to = end.min(start + region.bytes / FILE_PAGE_BYTES);
            (from < to).then(|| Overlap {
                pages: first_page + (from - start) / unit..first_page + (to - start).div_ceil(unit),
                skipped: from - first,
            })
        })
    }

    fn placed_of(&self, page: u64) -> &Placed {
        debug_assert!(page < self.page_count);
        let after = self.placed.partition_point(|placed| placed.first_page <= page);
        &self.placed[after - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Two regions with a gap in addresses and in the file; the second comes first in the file.
    fn gapped() -> Layout {
        Layout::new(
            PageSize::Base,
            vec![
                Region { address: 64 * MIB, bytes: MIB, file_offset: 0 },
                Region { address: 16 * MIB, bytes: 2 * MIB, file_offset: 4 * MIB },
            ],
        )
    }

    #[test]
    fn region_offset_is_not_forgotten() {
        let layout = gapped();
        assert_eq!(layout.file_page(0), 1024);
        assert_eq!(layout.file_page(511), 1024 + 511);
        assert_eq!(layout.file_page(512), 0);
        assert_eq!(layout.address(512), 64 * MIB);
    }

    #[test]
    fn addresses_outside_regions_have_no_page() {
        let layout = gapped();
        assert_eq!(layout.page_at(16 * MIB - 1), None);
        assert_eq!(layout.page_at(16 * MIB), Some(0));
        assert_eq!(layout.page_at(18 * MIB - 1), Some(511));
        assert_eq!(layout.page_at(18 * MIB), None);
        assert_eq!(layout.page_at(65 * MIB), None);
        assert_eq!(layout.page_at(u64::MAX), None);
    }

    #[test]
    fn run_that_spans_a_gap_is_split() {
        let layout = gapped();
        let overlaps: Vec<_> = layout.overlaps(250, 1024).collect();
        assert_eq!(
            overlaps,
            [
                Overlap { pages: 512 + 250..512 + 256, skipped: 0 },
                Overlap { pages: 0..250, skipped: 774 }
            ]
        );
        assert_eq!(layout.overlaps(300, 10).count(), 0);
        assert_eq!(layout.overlaps(u64::MAX, u64::MAX).count(), 0);
    }

    #[test]
    fn removal_counts_only_whole_pages() {
        let layout = gapped();
        let pages: Vec<_> = layout.pages_within(16 * MIB + 1, 64 * MIB + 4096).collect();
        assert_eq!(pages, [1..512, 512..513]);
        assert_eq!(layout.pages_within(0, 100).count(), 0);
        assert_eq!(layout.pages_within(18 * MIB, 64 * MIB).count(), 0);
    }

    #[test]
    fn huge_pages_hold_512_file_pages() {
        let layout = Layout::new(
            PageSize::Huge,
            vec![Region { address: 2 * MIB, bytes: 8 * MIB, file_offset: 2 * MIB }],
        );
        assert_eq!(layout.page_at(5 * MIB), Some(1));
        assert_eq!(layout.file_page(1), 1024);
        let overlaps: Vec<_> = layout.overlaps(1023, 2).collect();
        assert_eq!(overlaps, [Overlap { pages: 0..2, skipped: 0 }]);
        assert_eq!(layout.region_end(1), 4);
    }
}
