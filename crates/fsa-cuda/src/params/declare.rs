//! How a struct is declared for Rust and for the translation unit.

/// A struct as the translation unit asserts it.
pub(super) struct Declared {
    pub name: &'static str,
    pub bytes: usize,
    pub fields: &'static [(&'static str, usize, usize)],
}

macro_rules! device_structs {
    ($($(#[$doc:meta])* struct $name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, Default)]
            #[repr(C)]
            pub(crate) struct $name { $(pub $field: $type,)* }
            impl KernelParams for $name {}
        )*
        const DECLARED: &[Declared] = &[$(Declared {
            name: stringify!($name),
            bytes: size_of::<$name>(),
            fields: &[$((stringify!($field), std::mem::offset_of!($name, $field), size_of::<$type>()),)*],
        },)*];
    };
}

pub(super) use device_structs;
