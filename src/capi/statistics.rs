//! Statistics of the values of tensors.

use super::boundary::boundary;
use super::handle::sft_file;
use super::pointer::{self, Versioned, VersionedOut, invalid, versioned};
use super::types::sft_status;
use crate::error::Result;
use crate::format::statistics::{HISTOGRAM_BINS, Histogram, Statistics};
use crate::read::statistics::StatisticsRequest;

pub const SFT_HISTOGRAM_BINS: usize = HISTOGRAM_BINS;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_statistics {
    /// The size of the struct.
    pub struct_size: usize,
    pub count: u64,
    pub zeros: u64,
    pub nans: u64,
    pub infinities: u64,
    pub minimum: f64,
    pub maximum: f64,
    pub mean: f64,
    pub squared_deviations: f64,
}

// SAFETY: `repr(C)`, begins with its size, holds only numbers of 8 bytes, without padding.
versioned!(unsafe sft_statistics, 72);

impl sft_statistics {
    fn parse(self) -> Result<Statistics> {
        let Self { count, zeros, nans, infinities, minimum, maximum, mean, squared_deviations, .. } = self;
        if nans.checked_add(infinities).is_none_or(|others| others > count) {
            return Err(invalid(format!("{}: count is less than nans and infinities together", Self::NAME)));
        }
        Ok(Statistics { count, zeros, nans, infinities, minimum, maximum, mean, squared_deviations })
    }

    fn of(statistics: &Statistics) -> sft_statistics {
        let &Statistics { count, zeros, nans, infinities, minimum, maximum, mean, squared_deviations } =
            statistics;
        let struct_size = size_of::<sft_statistics>();
        Self { struct_size, count, zeros, nans, infinities, minimum, maximum, mean, squared_deviations }
    }
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_histogram {
    /// The size of the struct.
    pub struct_size: usize,
    pub first: i64,
    pub width: f64,
    pub bin_count: u64,
    pub counts: [u64; SFT_HISTOGRAM_BINS],
}

// SAFETY: `repr(C)`, begins with its size, holds only numbers of 8 bytes, without padding.
versioned!(unsafe sft_histogram, 1056);

impl sft_histogram {
    fn parse(&self) -> Result<Histogram> {
        let counts = usize::try_from(self.bin_count).ok().and_then(|count| self.counts.get(..count));
        counts.and_then(|counts| Histogram::from_parts(self.first, self.width, counts)).ok_or_else(|| {
            invalid(format!(
                "{}: first, width and bin_count are not those of a histogram: begin with SFT_HISTOGRAM_INIT",
                Self::NAME
            ))
        })
    }

    fn of(histogram: &Histogram) -> sft_histogram {
        let mut result = sft_histogram {
            struct_size: size_of::<sft_histogram>(),
            first: histogram.first(),
            width: histogram.width(),
            bin_count: histogram.counts().len() as u64,
            counts: [0; SFT_HISTOGRAM_BINS],
        };
        result.counts[..histogram.counts().len()].copy_from_slice(histogram.counts());
        result
    }
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct sft_statistics_request {
    pub index: usize,
    pub first: u64,
    pub count: u64,
    pub statistics: *mut sft_statistics,
    pub histogram: *mut sft_histogram,
}

/// The structs of a request: their memory, and what they hold.
struct Target<'a> {
    statistics: (VersionedOut<'a, sft_statistics>, Statistics),
    histogram: Option<(VersionedOut<'a, sft_histogram>, Histogram)>,
}

impl Target<'_> {
    /// # Safety
    ///
    /// "Pointers" and "Versions": each struct of `request` is NULL, or valid during the call for reads and writes of as many
    /// bytes as its `struct_size` says.
    unsafe fn new(request: &sft_statistics_request) -> Result<Self> {
        let &sft_statistics_request { statistics, histogram, .. } = request;
        // SAFETY: structs of their `struct_size` (this function's contract).
        let statistics =
            unsafe { (VersionedOut::new(statistics)?, pointer::options(statistics.cast_const())?.parse()?) };
        let histogram = if histogram.is_null() {
            None
        } else {
            // SAFETY: as above.
            Some(unsafe {
                (VersionedOut::new(histogram)?, pointer::options(histogram.cast_const())?.parse()?)
            })
        };
        Ok(Target { statistics, histogram })
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sft_file_compute_statistics(
    file: *const sft_file,
    requests: *const sft_statistics_request,
    count: usize,
) -> sft_status {
    boundary!({
        // SAFETY: a live handle (header, "Ownership", "Threads"); `count` requests ("Pointers").
        let (state, requests) =
            unsafe { (sft_file::state(file)?, pointer::array(requests, count, "requests")?) };
        let targets = requests.iter().map(|request| {
            // SAFETY: structs of their `struct_size` (header, "Pointers", "Versions").
            unsafe { Target::new(request) }
        });
        let mut targets = targets.collect::<Result<Vec<_>>>()?;
        let parts = requests.iter().zip(&mut targets).map(|(request, target)| StatisticsRequest {
            index: request.index,
            first: request.first,
            count: request.count,
            statistics: &mut target.statistics.1,
            histogram: target.histogram.as_mut().map(|(_, histogram)| histogram),
        });
        state.file.compute_statistics(&mut parts.collect::<Vec<_>>())?;
        for Target { statistics: (out, statistics), histogram } in &targets {
            out.set(sft_statistics::of(statistics));
            if let Some((out, histogram)) = histogram {
                out.set(sft_histogram::of(histogram));
            }
        }
        Ok(())
    })
}
