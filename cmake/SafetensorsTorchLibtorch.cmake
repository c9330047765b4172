# Finds libtorch for the package config: defines safetensors_torch::torch, and safetensors_torch::torch_cuda where there
# is one. Knows folders and flags of libtorch alone, nothing of safetensors_torch.

# The folders in which a libtorch (include/ and lib/) may be, best first.
function(_safetensors_torch_libtorch_roots result)
  set(roots)
  if(Torch_DIR)
    list(APPEND roots "${Torch_DIR}/../../..")
  endif()
  set(prefixes ${CMAKE_PREFIX_PATH})
  if(DEFINED ENV{CMAKE_PREFIX_PATH})
    string(REPLACE ":" ";" environment "$ENV{CMAKE_PREFIX_PATH}")
    list(APPEND prefixes ${environment})
  endif()
  foreach(prefix IN LISTS prefixes)
    # torch.utils.cmake_prefix_path is share/cmake inside the libtorch.
    list(APPEND roots "${prefix}" "${prefix}/../..")
  endforeach()
  list(APPEND roots ${CMAKE_SYSTEM_PREFIX_PATH})
  set(${result} "${roots}" PARENT_SCOPE)
endfunction()

# Sets `problem` to nothing, or to what is wrong and what to do about it.
function(safetensors_torch_find_libtorch problem)
  set(${problem} "" PARENT_SCOPE)
  if(TARGET torch)
    add_library(safetensors_torch::torch INTERFACE IMPORTED)
    set_target_properties(safetensors_torch::torch PROPERTIES INTERFACE_LINK_LIBRARIES torch)
    if(TARGET c10)
      set_property(TARGET safetensors_torch::torch APPEND PROPERTY INTERFACE_LINK_LIBRARIES c10)
    endif()
    return()
  endif()

  set(asked)
  if(LIBTORCH)
    set(asked "${LIBTORCH}")
    set(origin "LIBTORCH")
  elseif(DEFINED ENV{LIBTORCH} AND NOT "$ENV{LIBTORCH}" STREQUAL "")
    set(asked "$ENV{LIBTORCH}")
    set(origin "the environment's LIBTORCH")
  endif()
  if(asked)
    get_filename_component(roots "${asked}" ABSOLUTE BASE_DIR "${CMAKE_BINARY_DIR}")
  else()
    _safetensors_torch_libtorch_roots(roots)
  endif()

  set(root)
  foreach(candidate IN LISTS roots)
    foreach(libdir lib lib64 "lib/${CMAKE_LIBRARY_ARCHITECTURE}")
      if(EXISTS "${candidate}/${libdir}/libtorch_cpu.so" AND EXISTS "${candidate}/${libdir}/libc10.so" AND
         EXISTS "${candidate}/include/torch/csrc/api/include/torch/nn/module.h")
        get_filename_component(root "${candidate}" ABSOLUTE)
        set(libraries "${root}/${libdir}")
        break()
      endif()
    endforeach()
    if(root)
      break()
    endif()
  endforeach()
  if(NOT root)
    set(remedies
        "Name a libtorch with -DLIBTORCH=DIR (the folder with include/ and lib/ of libtorch or of Python's torch), \
or with -DCMAKE_PREFIX_PATH=\"$(python3 -c 'import torch; print(torch.utils.cmake_prefix_path)')\".")
    if(asked)
      set(${problem} "${origin} is ${asked}, but there is no libtorch in it. ${remedies}" PARENT_SCOPE)
    else()
      set(${problem} "libtorch was not found. ${remedies}" PARENT_SCOPE)
    endif()
    return()
  endif()

  # Releases before 2.7 came with either ABI and say which; since then there is one.
  set(abi 1)
  if(DEFINED LIBTORCH_CXX11_ABI)
    set(abi "${LIBTORCH_CXX11_ABI}")
  elseif(EXISTS "${root}/share/cmake/Torch/TorchConfig.cmake")
    file(STRINGS "${root}/share/cmake/Torch/TorchConfig.cmake" stated REGEX "_GLIBCXX_USE_CXX11_ABI=[01]" LIMIT_COUNT 1)
    if(stated MATCHES "_GLIBCXX_USE_CXX11_ABI=([01])")
      set(abi "${CMAKE_MATCH_1}")
    endif()
  endif()

  foreach(name c10 torch_cpu)
    add_library(safetensors_torch::_${name} SHARED IMPORTED)
    set_target_properties(safetensors_torch::_${name} PROPERTIES
      IMPORTED_LOCATION "${libraries}/lib${name}.so")
  endforeach()
  set(includes "${root}/include" "${root}/include/torch/csrc/api/include")
  add_library(safetensors_torch::torch INTERFACE IMPORTED)
  set_target_properties(safetensors_torch::torch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${includes}"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${includes}"
    INTERFACE_COMPILE_DEFINITIONS "_GLIBCXX_USE_CXX11_ABI=${abi}"
    INTERFACE_COMPILE_FEATURES cxx_std_17
    INTERFACE_LINK_LIBRARIES "safetensors_torch::_torch_cpu;safetensors_torch::_c10")
  if(EXISTS "${libraries}/libtorch_cuda.so")
    add_library(safetensors_torch::torch_cuda INTERFACE IMPORTED)
    set_target_properties(safetensors_torch::torch_cuda PROPERTIES
      INTERFACE_LINK_LIBRARIES
      "-Wl,--push-state,--no-as-needed,${libraries}/libtorch_cuda.so,--pop-state;safetensors_torch::torch")
  endif()
  if(NOT safetensors_torch_FIND_QUIETLY)
    message(STATUS "safetensors_torch: libtorch is ${root}")
  endif()
endfunction()
