//! Where guest memory lies: host addresses <-> pages of the memory file. Pure arithmetic.
//!
//! A *unit* is what the kernel installs at once: a guest page of 4 KiB or 2 MiB. Units are
//! numbered by their place in the memory file, so that a unit names one page of one region.

use reap_store::PAGE_SIZE;

/// Contiguous guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// First host address.
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    /// Where it begins in the memory file.
    pub(crate) offset: u64,
}

/// All regions of a VM, which overlap neither in addresses nor in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// By offset in the file.
    regions: Vec<Region>,
    page_bytes: u64,
    file_units: u64,
}

impl Layout {
    /// `regions` are (first address, bytes, offset), checked by the handshake.
    pub(crate) fn new(
        regions: impl Iterator<Item = (u64, u64, u64)>,
        page_bytes: u64,
        memory_bytes: u64,
    ) -> Self {
        let mut regions: Vec<_> =
            regions.map(|(start, bytes, offset)| Region { start, bytes, offset }).collect();
        regions.sort_by_key(|region| region.offset);
        Self { regions, page_bytes, file_units: memory_bytes.div_ceil(page_bytes) }
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Bytes of a guest page.
    pub(crate) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Pages of the memory file in one unit.
    pub(crate) fn pages_per_unit(&self) -> u64 {
        self.page_bytes / PAGE_SIZE as u64
    }

    /// The pages of the memory file that a unit holds; they may go beyond its end.
    pub(crate) fn pages_of(&self, unit: u64) -> std::ops::Range<u64> {
        let first = unit * self.pages_per_unit();
        first..first + self.pages_per_unit()
    }

    /// Units of the whole memory file.
    pub(crate) fn file_units(&self) -> u64 {
        self.file_units
    }

    /// The unit at a host address.
    pub(crate) fn unit_at(&self, address: u64) -> Option<u64> {
        let region = self
            .regions
            .iter()
            .find(|region| region.start <= address && address - region.start < region.bytes)?;
        Some((region.offset + (address - region.start)) / self.page_bytes)
    }

    /// The host address of a unit, and how many units follow it contiguously, itself included.
    pub(crate) fn address_of(&self, unit: u64) -> Option<(u64, u64)> {
        let offset = unit * self.page_bytes;
        let region = self
            .regions
            .iter()
            .find(|region| region.offset <= offset && offset - region.offset < region.bytes)?;
        let skipped = offset - region.offset;
        Some((region.start + skipped, (region.bytes - skipped) / self.page_bytes))
    }

    /// The units that an address range touches, as runs of (first unit, count). Parts outside all
    /// regions are left out.
    pub(crate) fn units_in(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        self.regions
            .iter()
            .filter_map(|region| {
                let from = start.max(region.start);
                let to = end.min(region.start + region.bytes);
                if from >= to {
                    return None;
                }
                let first = (region.offset + (from - region.start)) / self.page_bytes;
                let last = (region.offset + (to - 1 - region.start)) / self.page_bytes;
                Some((first, last - first + 1))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_a_gap() -> Layout {
        // As on x86: memory continues above the hole below 4 GiB.
        let regions = [(0x10_0000, 0x4000, 0), (0x80_0000, 0x2000, 0x4000)];
        Layout::new(regions.into_iter(), 4096, 0x6000)
    }

    #[test]
    fn addresses_and_units_are_each_others_inverse() {
        let layout = with_a_gap();
        for unit in 0..6 {
            let (address, _) = layout.address_of(unit).expect("inside");
            assert_eq!(layout.unit_at(address), Some(unit));
            assert_eq!(layout.unit_at(address + 4095), Some(unit));
        }
        assert_eq!(layout.address_of(3), Some((0x10_3000, 1)), "runs end with their region");
        assert_eq!(layout.address_of(4), Some((0x80_0000, 2)), "the offset counts");
        assert_eq!(layout.address_of(6), None);
        assert_eq!(layout.unit_at(0x10_4000), None);
        assert_eq!(layout.unit_at(0x0f_ffff), None);
    }

    #[test]
    fn ranges_become_units_of_every_region_they_touch() {
        let layout = with_a_gap();
        assert_eq!(layout.units_in(0x10_1000, 0x10_3000), vec![(1, 2)]);
        assert_eq!(layout.units_in(0, u64::MAX), vec![(0, 4), (4, 2)]);
        assert_eq!(layout.units_in(0x20_0000, 0x30_0000), vec![]);
    }
}
