# The libtorch layer of the Python package for the torch that was found: the target SafetensorsTorch::safetensors_torch. It is
# a compiled layer of the package if one fits, otherwise compiled from the package's sources in the project's build directory.

# Sets `layer` to the compiled layer in the directory `libraries` that fits the torch, or `reason` to why there is none.
function(_safetensors_torch_compiled_layer libraries layer reason)
  set(${layer} "" PARENT_SCOPE)
  # The headers have the number of the release even for a pre-release, whose symbols may differ. Python's torch has
  # version.py, and an unpacked libtorch build-version.
  set(root "${SafetensorsTorch_TORCH_ROOT}")
  set(version "")
  foreach(file version.py build-version)
    if(EXISTS "${root}/${file}")
      file(READ "${root}/${file}" text)
      if(text MATCHES "(^|__version__ = ')([0-9]+\\.[0-9]+[^'\n]*)")
        set(version "${CMAKE_MATCH_2}")
        break()
      endif()
    endif()
  endforeach()
  if(NOT version)
    set(${reason} "neither version.py nor build-version in ${root} says whether that torch is a release" PARENT_SCOPE)
    return()
  endif()
  set(versions "${version}")
  if(version MATCHES "^([0-9]+\\.[0-9]+)\\.[0-9]+(\\+.*)?$")
    list(APPEND versions "${CMAKE_MATCH_1}")
  endif()
  set(abi cxx11)
  if(NOT SafetensorsTorch_TORCH_ABI)
    set(abi precxx11)
  endif()
  foreach(version IN LISTS versions)
    set(file "${libraries}/libsafetensors_torch-torch${version}-${abi}.so")
    if(EXISTS "${file}")
      set(${layer} "${file}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  list(JOIN versions " or " versions)
  set(${reason} "the package has none for torch ${versions} with C++ ABI ${SafetensorsTorch_TORCH_ABI}" PARENT_SCOPE)
endfunction()

# `root` contains include/, cpp/, bridge/ and lib/. Sets `problem` to the error, or to nothing.
function(safetensors_torch_add_layer root problem)
  set(${problem} "" PARENT_SCOPE)
  if(TARGET SafetensorsTorch::safetensors_torch)
    return()
  endif()
  get_property(languages GLOBAL PROPERTY ENABLED_LANGUAGES)
  if(NOT "CXX" IN_LIST languages)
    set(${problem} "the project does not enable C++, which the libtorch layer needs; add it: project(... LANGUAGES CXX)"
        PARENT_SCOPE)
    return()
  endif()

  _safetensors_torch_compiled_layer("${root}/lib" layer reason)
  if(layer)
    get_filename_component(name "${layer}" NAME)
    add_library(SafetensorsTorch::safetensors_torch SHARED IMPORTED)
    set_target_properties(SafetensorsTorch::safetensors_torch PROPERTIES
      IMPORTED_LOCATION "${layer}"
      IMPORTED_SONAME "${name}"
      INTERFACE_INCLUDE_DIRECTORIES "${root}/include"
      INTERFACE_COMPILE_FEATURES cxx_std_17
      INTERFACE_LINK_LIBRARIES SafetensorsTorch::torch)
    if(NOT SafetensorsTorch_FIND_QUIETLY)
      message(STATUS "SafetensorsTorch: using the compiled libtorch layer ${layer}")
    endif()
    return()
  endif()

  # Nothing in the layer calls the C functions; -u makes the linker take them from the core.
  file(STRINGS "${root}/include/safetensors_torch.h" declarations REGEX "^[a-z].*[ *]sft_[a-z0-9_]+\\(")
  set(exported)
  foreach(declaration IN LISTS declarations)
    if(NOT declaration MATCHES "^(static|typedef) " AND declaration MATCHES "[ *](sft_[a-z0-9_]+)\\(")
      list(APPEND exported "-Wl,-u,${CMAKE_MATCH_1}")
    endif()
  endforeach()
  file(STRINGS "${root}/include/safetensors_torch.h" version REGEX "^#define SFT_VERSION_STRING \"" LIMIT_COUNT 1)
  string(REGEX REPLACE "^[^\"]*\"([0-9.]+)[^\"]*\".*$" "\\1" version "${version}")
  string(REGEX MATCH "^[0-9]+" major "${version}")

  file(GLOB bridge "${root}/bridge/*.cc")
  add_library(safetensors_torch SHARED "${root}/cpp/layer.cpp" ${bridge})
  add_library(SafetensorsTorch::safetensors_torch ALIAS safetensors_torch)
  target_include_directories(safetensors_torch PRIVATE "${root}" "${root}/bridge/include" "${root}/include")
  # BUILD_INTERFACE: an installed package of the project finds this one by find_package.
  target_include_directories(safetensors_torch SYSTEM INTERFACE "$<BUILD_INTERFACE:${root}/include>")
  # No warnings for code that is not the project's. -O2: without a build type the layer would not be optimized.
  target_compile_options(safetensors_torch PRIVATE -w $<$<CONFIG:>:-O2>)
  target_compile_features(safetensors_torch PUBLIC cxx_std_17)
  set(script "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/SafetensorsTorchLayer.map")
  target_link_libraries(safetensors_torch
    PUBLIC SafetensorsTorch::torch
    PRIVATE "${root}/lib/libsafetensors_torch_c.a" pthread dl m)
  target_link_options(safetensors_torch PRIVATE ${exported} "-Wl,--version-script=${script}" -Wl,--gc-sections
    -Wl,-z,nodelete)
  set_target_properties(safetensors_torch PROPERTIES
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    UNITY_BUILD OFF
    CXX_CLANG_TIDY ""
    CXX_CPPCHECK ""
    CXX_INCLUDE_WHAT_YOU_USE ""
    LINK_DEPENDS "${script}"
    VERSION "${version}"
    SOVERSION "${major}")
  if(NOT SafetensorsTorch_FIND_QUIETLY)
    message(STATUS "SafetensorsTorch: compiling the libtorch layer with this project, for torch \
${SafetensorsTorch_TORCH_VERSION}: ${reason}")
  endif()
endfunction()
