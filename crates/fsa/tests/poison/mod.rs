//! Outputs that show whether anything was written to them.

use fsa::TensorViewMut;

/// A NaN with a payload: no computation yields it, and a comparison of bits tells it from any other value.
const POISON: u32 = 0x7fa5_1234;

/// An output that shows whether anything was written to it.
pub struct Poisoned {
    data: Vec<f32>,
    shape: Vec<usize>,
}

impl Poisoned {
    pub fn new(shape: &[usize]) -> Self {
        Self { data: vec![f32::from_bits(POISON); shape.iter().product()], shape: shape.to_vec() }
    }

    pub fn view(&mut self) -> TensorViewMut<'_> {
        TensorViewMut::new("poisoned", &mut self.data, &self.shape).expect("shape holds the data")
    }

    #[track_caller]
    pub fn assert_untouched(&self) {
        let written = self.data.iter().position(|value| value.to_bits() != POISON);
        assert_eq!(written, None, "an output of shape {:?} was written at this offset", self.shape);
    }
}
